"""Conversion of low-rank layers back to dense layers."""

import copy
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from .kinds import kind_of
from .layer import LowRankLayer, core_names

Model = TypeVar("Model", bound=nn.Module)
Key = tuple[int, bool]
"""The source of a value in the low-rank model: ``id`` of the tensor or of the low-rank layer, and whether the tensor is
converted to the layout of another layer kind. Names with the same key are tied."""


def merge(model: nn.Module, skeleton: Model) -> Model:
    """Return the dense model that is equivalent to a model with low-rank layers.

    Each low-rank layer is replaced by the dense layer of the skeleton, with the weight ``a * W0 + U V^T`` (of a deep
    layer, ``a * W0 + U C_k ... C_1 V^T``). The weight is computed in float64 and rounded once to the dtype of the
    factors. All other parameters, buffers (including non-persistent ones) and tensor attributes of modules are copied.
    Tensors that are tied in the model or in the skeleton are tied in the result. If ``linearise`` was called, a
    skeleton from before that call restores each ``Conv1D``.

    Args:
        model: model with low-rank layers and the names of the skeleton. Its tensors must be plain and whole (no
            DTensor, none on ``meta``).
        skeleton: dense model on any device. Its values are not read, and it is not changed. ``requires_grad`` of the
            result follows it.

    Returns:
        A copy of the skeleton that shares no memory with the model. Peak extra memory is the dense model plus up to
        four float64 copies of the largest weight.

    Raises:
        ValueError: a layer has an activation between its factors; a tensor is missing, unknown to the skeleton, not
            whole, or of another shape; or tensors that the skeleton ties differ in the model.
    """
    # The tensors of the skeleton are replaced below, so copying them would waste memory.
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
    """Values for the tensors of the skeleton, taken from a model with low-rank layers."""

    def __init__(self, model: nn.Module, skeleton: nn.Module) -> None:
        self.model, self.skeleton = model, skeleton

    def module(self, name: str) -> nn.Module:
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the model has no {name}, which the skeleton has") from None

    def __call__(self, name: str) -> tuple[Key, Callable[[], Tensor]]:
        """Return the source of a tensor of the skeleton and a function that makes a contiguous copy of its value."""
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
        sizes = {"U": layer.shape[0], "V": layer.shape[1]} | dict.fromkeys(core_names(layer.depth), layer.modes)
        for leaf, size in sizes.items():
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
        """Raise ``ValueError`` if the model has a tensor that the skeleton does not have."""
        low_rank = {name: module for name, module in self.model.named_modules() if isinstance(module, LowRankLayer)}
        factors = {
            _joined(name, leaf)
            for name, layer in low_rank.items()
            for leaf in ("U", "V", *core_names(layer.depth), "base", "base_scale")
        }
        known = {name for name, _ in _named_tensors(self.skeleton)}
        for name, _ in _named_tensors(self.model):
            if name not in known and name not in factors:
                raise ValueError(f"the skeleton has no {name}, which the model has")


def _fill(dense: nn.Module, skeleton: nn.Module, source: _Source, made: dict[Key, Tensor]) -> None:
    """Set the parameters and buffers of the dense model.

    Names become one tensor if they are one tensor in the skeleton or have the same source.
    """
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
    """Raise ``ValueError`` unless the tensor is plain and holds values."""
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
    """Yield the parameters, the buffers and the tensor attributes of all modules."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def _joined(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf
