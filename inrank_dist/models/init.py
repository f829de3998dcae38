"""How each dense parameter starts, told by its name alone so that it holds for models on `meta`."""

import math
from typing import Literal, NamedTuple

STD = 0.02


class InitRule(NamedTuple):
    """Initial values of one parameter: `kind`, and for "normal" (mean 0) its standard deviation `std`."""

    kind: Literal["normal", "ones", "zeros"]
    std: float = 0.0


def init_rule(parameter_name: str, num_layers: int) -> InitRule:
    """Rule for a parameter name of the dense model, e.g. "blocks.3.mlp.down.weight".

    Normal with std 0.02, and 0.02 / sqrt(2 * num_layers) for the two projections of each block that add to
    the residual stream, so that its variance does not grow with depth (Radford et al. 2019, "Language Models
    are Unsupervised Multitask Learners", section 2.3). Norm weights are ones, biases zeros. Raises KeyError
    for a name that is neither a weight nor a bias, such as a low-rank factor's.
    """
    *path, leaf = parameter_name.split(".")
    if not path or leaf not in ("weight", "bias"):
        raise KeyError(parameter_name)
    if leaf == "bias":
        return InitRule("zeros")
    if path[-1].endswith("norm"):
        return InitRule("ones")
    if path[-2:] in (["attention", "out"], ["mlp", "down"]):
        return InitRule("normal", STD / math.sqrt(2 * num_layers))
    return InitRule("normal", STD)
