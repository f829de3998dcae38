"""Dense layers to low-rank layers, inside any module."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from .kinds import kind_of

Model = TypeVar("Model", bound=nn.Module)

_ATTENTION = r"attention|attn|self_attn|self_attention|cross_attn|crossattention"
_PART = rf"(mlp|{_ATTENTION})\."
_BEFORE = rf"((?!{_PART})[^.]+\.)*"

NAMED_TARGETS = {
    "mlp": r"(^|\.)mlp\.",
    "attention": rf"(^|\.)({_ATTENTION})\.",
    "all": rf"(^|\.){_PART}",
    # An index of a list before the part of the block: that of the block, or of a stage and the block in it.
    "inner": rf"^{_BEFORE}(?!0\.)\d+\.{_BEFORE}{_PART}",
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


def find_targets(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Module]:
    """The dense layers that are to be factored, of any registered kind, in the model's order.

    Args:
        targets: ``mlp``, ``attention``, ``all`` (both), ``inner`` (both, but not in the first block), or regular
            expressions searched in the module's name.

    Raises:
        ValueError: a target that is no valid expression or that matches no such layer; or one that matches a layer
            that cannot be factored, is used under several names, or shares a parameter.
    """
    # Under all of their names: a shared layer must be found by whichever a target matches.
    layers = {name: module for name, module in model.named_modules(remove_duplicate=False) if kind_of(module)}
    if not layers:
        raise ValueError("the model has no linear layer")
    chosen = set()
    for target in targets:
        try:
            pattern = re.compile(NAMED_TARGETS.get(target, target))
        except re.error as error:
            raise ValueError(f"{target!r} is not a regular expression ({error})") from None
        matched = {name for name in layers if pattern.search(name)}
        if not matched:
            raise ValueError(f"{target!r} matches no linear layer; the layers are named like {next(iter(layers))!r}")
        chosen |= matched
    found = {name: module for name, module in layers.items() if name in chosen}
    for name, reason in _refusals(model, layers, found):
        raise ValueError(f"{name} {reason}, so it cannot be factored; write targets that leave it out")
    return found


def _refusals(
    model: nn.Module, layers: Mapping[str, nn.Module], found: Mapping[str, nn.Module]
) -> Iterator[tuple[str, str]]:
    """Layers that cannot be factored, and why."""
    owners: dict[int, list[str]] = {}
    for owner, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(owner)
    for name, module in found.items():
        for other, same in layers.items():
            if same is module and other != name:
                yield name, f"is the same layer as {other}"
        for leaf, parameter in module.named_parameters(recurse=False):
            for owner in owners[id(parameter)]:
                if owner != f"{name}.{leaf}":
                    place = owner.rpartition(".")[0]
                    embeds = isinstance(model.get_submodule(place), nn.Embedding)
                    yield name, f"has a {leaf} that is tied to " + (f"the embedding {place}" if embeds else owner)
        kind = kind_of(module)
        if kind is not None and (reason := kind.refusal(module)):
            yield name, reason


def convert(skeleton: Model, layout: Layout) -> Model:
    """A copy of a dense ``meta`` model with the named layers low-rank.

    Shapes come from the skeleton; nothing is allocated. Reshaping is rebuilding: engines convert the same dense
    skeleton again with other ranks.

    Raises:
        TypeError: a named layer is of no registered kind.
        ValueError: it is of one but cannot be factored, or has to be replaced by ``linearise`` first.
    """
    model = copy.deepcopy(skeleton)
    for name, layer in layout.items():
        dense = model.get_submodule(name)
        kind = kind_of(dense)
        if kind is None:
            raise TypeError(f"{name} is a {type(dense).__name__}, not a linear layer")
        if reason := kind.refusal(dense):
            raise ValueError(f"{name} {reason}, so it cannot be factored")
        if kind.transposed:
            raise ValueError(
                f"{name} is a {type(dense).__name__}, which stores its weight as (in, out); call linearise first"
            )
        low_rank = kind.make(dense, layer.modes, layer.base)
        low_rank.train(dense.training)
        bias = dense._parameters.get("bias")
        if bias is not None and low_rank.bias is not None:
            low_rank.bias.requires_grad_(bias.requires_grad)
        model.set_submodule(name, low_rank)
    return model
