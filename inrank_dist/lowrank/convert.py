"""Dense layers to low-rank layers, inside any module."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from .linear import LowRankLinear

Model = TypeVar("Model", bound=nn.Module)

NAMED_TARGETS = {
    "mlp": r"(^|\.)mlp\.",
    "attention": r"(^|\.)(attention|attn|self_attn)\.",
    "all": r"(^|\.)(mlp|attention|attn|self_attn)\.",
    "inner": r"(^|\.)(?!0\.)\d+\.(mlp|attention|attn|self_attn)\.",
}


@dataclass(frozen=True)
class LayerLayout:
    """What a low-rank layer looks like now.

    Attributes:
        rank: active rank ``r``.
        modes: ``R``, the columns that exist; ``rank`` plus what is left of the buffer.
        base: whether the dense base is there.
    """

    rank: int
    modes: int
    base: bool


Layout = Mapping[str, LayerLayout]
"""Layer name -> layout; layers that are not named are dense."""


def find_targets(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Linear]:
    """The ``nn.Linear`` modules that are to be factored, in the model's order.

    Args:
        targets: ``mlp``, ``attention``, ``all`` (both), ``inner`` (both, but not in the first block), or regular
            expressions searched in the module's name.

    Raises:
        ValueError: a target that is no valid expression or that matches no linear layer.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not linears:
        raise ValueError("the model has no linear layer")
    chosen = set()
    for target in targets:
        try:
            pattern = re.compile(NAMED_TARGETS.get(target, target))
        except re.error as error:
            raise ValueError(f"{target!r} is not a regular expression ({error})") from None
        matched = {name for name in linears if pattern.search(name)}
        if not matched:
            raise ValueError(f"{target!r} matches no linear layer; the layers are named like {next(iter(linears))!r}")
        chosen |= matched
    return {name: module for name, module in linears.items() if name in chosen}


def convert(skeleton: Model, layout: Layout) -> Model:
    """A copy of a dense ``meta`` model with the named layers low-rank.

    Shapes come from the skeleton; nothing is allocated. Reshaping is rebuilding: engines convert the same dense
    skeleton again with other ranks.
    """
    model = copy.deepcopy(skeleton)
    for name, layer in layout.items():
        dense = model.get_submodule(name)
        if not isinstance(dense, nn.Linear):
            raise TypeError(f"{name} is a {type(dense).__name__}, not a linear layer")
        parent, _, child = name.rpartition(".")
        low_rank = LowRankLinear(
            dense.in_features,
            dense.out_features,
            layer.modes,
            bias=dense.bias is not None,
            base=layer.base,
            device="meta",
            dtype=dense.weight.dtype,
        )
        setattr(model.get_submodule(parent), child, low_rank)
    return model
