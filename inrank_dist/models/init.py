"""Initialisation of dense parameters by name, which also works for models on ``meta``."""

import math
from typing import Literal, NamedTuple

STD = 0.02


class InitRule(NamedTuple):
    """Distribution of the initial values of a parameter.

    Attributes:
        kind: ``normal`` (with mean 0), ``ones`` or ``zeros``.
        std: standard deviation, for ``normal``.
    """

    kind: Literal["normal", "ones", "zeros"]
    std: float = 0.0


def init_rule(parameter_name: str, num_layers: int) -> InitRule:
    """Return the initialisation of a parameter of the dense model.

    Matrices are normal with standard deviation 0.02. For the two projections of each block that write to the residual
    stream it is ``0.02 / sqrt(2 * num_layers)``, so the variance of the stream does not grow with depth (Radford et
    al., 2019, "Language Models are Unsupervised Multitask Learners", section 2.3). Norm weights are ones, biases are
    zeros.

    Args:
        parameter_name: name in the dense model, such as ``blocks.3.mlp.down.weight``.
        num_layers: number of blocks.

    Raises:
        KeyError: if the name is neither that of a weight nor of a bias, such as the name of a low-rank factor.
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
