"""Conversion of the dense layers of a model to low-rank layers."""

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
    # The index before the part of the block is that of the block, perhaps preceded by that of a stage.
    "inner": rf"^{_BEFORE}(?!0\.)\d+\.{_BEFORE}{_PART}",
}


@dataclass(frozen=True)
class LayerLayout:
    """The shape of a low-rank layer.

    Attributes:
        rank: active rank ``r``.
        modes: number of modes ``R >= rank``, the columns of both factors.
        base: whether the layer has a dense base ``W0``.
        depth: number of factors, at least 2. Beyond 2 there are ``depth - 2`` cores ``(R, R)``.
        fixed_outer: whether ``U`` and ``V`` are not trained.
    """

    rank: int
    modes: int
    base: bool
    depth: int = 2
    fixed_outer: bool = False


Layout = Mapping[str, LayerLayout]
"""Layer name -> layout. Layers that are absent are dense."""


def find_targets(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Module]:
    """Return the dense layers that ``targets`` selects, by name, in the order of the model.

    Layers of every registered kind can be selected.

    Args:
        targets: ``mlp``, ``attention``, ``all`` (both), ``inner`` (both, except in the first block), or regular
            expressions that are searched in the name of the module.

    Raises:
        ValueError: a target is not a valid regular expression or matches no layer, or a selected layer cannot be
            factored, is used under several names, or shares a parameter.
    """
    # A target may match any of the names of a shared layer.
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
    """Yield the name of each layer that cannot be factored, with the reason."""
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


def freeze_rest(model: nn.Module, layers: Iterable[str]) -> None:
    """Exclude all parameters from training except the weights of the named layers, in place."""
    weights = {id(model.get_submodule(name).weight) for name in layers}
    for parameter in model.parameters():
        if id(parameter) not in weights:
            parameter.requires_grad_(False)


def convert(skeleton: Model, layout: Layout) -> Model:
    """Return a copy of a dense model on ``meta`` in which the named layers are low-rank.

    No memory is allocated. Engines change ranks by converting the same skeleton again with another layout.

    Args:
        skeleton: dense model on ``meta``; it is not changed.
        layout: layer name -> layout.

    Raises:
        TypeError: a named layer has no registered kind.
        ValueError: a named layer cannot be factored, or must be replaced by ``linearise`` first.
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
        if layer.depth > 2:
            low_rank.deepen(layer.depth)
        for factor in (low_rank.U, low_rank.V):
            factor.requires_grad_(not layer.fixed_outer)
        low_rank.train(dense.training)
        bias = dense._parameters.get("bias")
        if bias is not None and low_rank.bias is not None:
            low_rank.bias.requires_grad_(bias.requires_grad)
        model.set_submodule(name, low_rank)
    return model
