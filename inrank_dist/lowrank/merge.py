"""Low-rank layers back to the dense ones that they stand for."""

import copy
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from .kinds import kind_of
from .layer import LowRankLayer

Model = TypeVar("Model", bound=nn.Module)
Key = tuple[int, bool]
"""Which tensor of the low-rank model a value comes from: ``id`` of the tensor or of the low-rank layer that it is
computed from, and whether it was reshaped. Names with the same key are tied."""


def merge(model: nn.Module, skeleton: Model) -> Model:
    """The dense model that computes what a model with low-rank layers does.

    Each low-rank layer becomes the dense layer that the skeleton has in its place, with the weight ``a * W0 + U V^T``,
    computed in float64 and rounded once to the dtype of the factors. All other parameters and buffers, non-persistent
    ones included, are copied, and tensors that are attributes of a module likewise. What is tied in the model or in the
    skeleton is tied in the result. A skeleton as it was before ``linearise`` gives each ``Conv1D`` back.

    Args:
        model: holds whole plain tensors (no DTensor, nothing on ``meta``), under the names of the skeleton.
        skeleton: the dense model, on any device; its values are not read and it is not changed. Which parameters take
            gradients is as it says.

    Returns:
        A copy of the skeleton that shares no memory with the model. Peak extra memory: the dense model, and up to four
        copies of the largest weight in float64.

    Raises:
        ValueError: a layer has an activation between its factors, or a tensor is missing, too many, not whole, or not
            of the skeleton's shape; or the skeleton ties tensors that differ in the model. The name is given.
    """
    # The skeleton's tensors are replaced below, so they are not copied: it may be a real model.
    dense = copy.deepcopy(skeleton, {id(tensor): tensor for tensor in _tensors(skeleton)})
    source = _Source(model, skeleton)
    source.refuse_surplus()
    made: dict[Key, Tensor] = {}
    with torch.no_grad():
        _fill(dense, skeleton, source, made)
        for name, module in dense.named_modules():
            counterpart = source.module(name)
            module.training = counterpart.training
            for attribute, value in vars(module).items():
                held = vars(counterpart).get(attribute)
                if not isinstance(value, Tensor):
                    continue
                if not isinstance(held, Tensor):
                    raise ValueError(f"the model has no tensor {_joined(name, attribute)}, which the skeleton has")
                _check(_joined(name, attribute), held)
                if (id(held), False) not in made:
                    made[id(held), False] = _copied(held)
                vars(module)[attribute] = made[id(held), False]
    return dense


class _Source:
    """Values for the skeleton's tensors, by name, from a model with low-rank layers."""

    def __init__(self, model: nn.Module, skeleton: nn.Module) -> None:
        self.model, self.skeleton = model, skeleton

    def module(self, name: str) -> nn.Module:
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the model has no {name}, which the skeleton has") from None

    def __call__(self, name: str) -> tuple[Key, Callable[[], Tensor]]:
        """Where a tensor of the skeleton comes from, and a new tensor with its value, plain and contiguous."""
        path, _, leaf = name.rpartition(".")
        module, target = self.module(path), self.skeleton.get_submodule(path)
        if isinstance(module, LowRankLayer) and leaf == "weight":
            return (id(module), False), lambda: self._merged(path, module, target)
        tensor = (module._parameters | module._buffers).get(leaf)
        if tensor is None:
            raise ValueError(f"the model has no {name}, which the skeleton has")
        _check(name, tensor)
        kind, wanted = kind_of(module), kind_of(target)
        if leaf == "weight" and kind is not wanted and kind is not None and wanted is not None:
            return (id(tensor), True), lambda: _copied(wanted.restore(target, kind.matrix(tensor)))
        return (id(tensor), False), lambda: _copied(tensor)

    def _merged(self, name: str, layer: LowRankLayer, target: nn.Module) -> Tensor:
        kind = kind_of(target)
        if kind is None:
            raise ValueError(f"{name} is low-rank, but the skeleton has a {type(target).__name__} in its place")
        for leaf, size in (("U", layer.shape[0]), ("V", layer.shape[1])):
            factor = getattr(layer, leaf)
            _check(f"{name}.{leaf}", factor)
            _check_shape(f"{name}.{leaf}", factor, (size, layer.modes))
        if layer.base is not None:
            _check(f"{name}.base", layer.base)
            _check_shape(f"{name}.base", layer.base, layer.shape)
        if layer.shape != kind.shape(target):
            raise ValueError(f"{name} is {layer.shape} in the model and {kind.shape(target)} in the skeleton")
        try:
            matrix = layer.weight(torch.float64)
        except ValueError as error:
            raise ValueError(f"{name} cannot be merged: {error}") from None
        return kind.restore(target, matrix.to(layer.U.dtype)).contiguous()

    def refuse_surplus(self) -> None:
        """Refuse tensors of the model that would be lost."""
        low_rank = {name for name, module in self.model.named_modules() if isinstance(module, LowRankLayer)}
        factors = {_joined(name, leaf) for name in low_rank for leaf in ("U", "V", "base", "base_scale")}
        known = {name for name, _ in _named_tensors(self.skeleton)}
        for name, _ in _named_tensors(self.model):
            if name not in known and name not in factors:
                raise ValueError(f"the skeleton has no {name}, which the model has")


def _fill(dense: nn.Module, skeleton: nn.Module, source: _Source, made: dict[Key, Tensor]) -> None:
    """Give the dense model its values; names that are one tensor in the skeleton, or come from one, become one."""
    groups: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in _named_tensors(skeleton):
        groups.setdefault(id(tensor), (tensor, []))[1].append(name)
    for tensor, names in groups.values():
        first = None
        for name in names:
            key, value = source(name)
            new = made.get(key)
            if new is None:
                new = value()
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            _check_shape(name, new, tuple(tensor.shape))
            if first is not None and new is not first and not torch.equal(new, first):
                raise ValueError(f"{names[0]} and {name} are tied in the skeleton but differ in the model")
            first = made[key] = new if first is None else first
            path, _, leaf = name.rpartition(".")
            module = dense.get_submodule(path)
            if isinstance(first, nn.Parameter):
                module._parameters[leaf] = first
            else:
                module._buffers[leaf] = first


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _check(name: str, tensor: Tensor) -> None:
    """Refuse what does not hold all of a tensor's values in the open."""
    if type(tensor) not in (Tensor, nn.Parameter):
        raise ValueError(f"{name} is a {type(tensor).__name__}; gather it into a plain tensor before merging")
    if tensor.is_meta:
        raise ValueError(f"{name} is on meta and has no values")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)} in the model, where {shape} is expected")


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that are attributes of a module."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def _joined(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf
