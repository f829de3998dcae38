"""The registry of layer kinds: the types of dense layers that can be replaced by low-rank layers."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from .conv import Conv2dKind
from .conv1d import Conv1dKind
from .layer import LayerKind, qualified_name
from .linear import LinearKind

KINDS: dict[type[nn.Module] | str, LayerKind[Any]] = {}
"""Type of a dense layer, or its qualified name -> layer kind."""


def register_layer_kind(kind: LayerKind[Any]) -> None:
    """Register a layer kind.

    Raises:
        ValueError: its type of dense layer already has a kind.
    """
    if kind.dense in KINDS:
        raise ValueError(f"{kind.dense} has a layer kind already, {type(KINDS[kind.dense]).__name__}")
    KINDS[kind.dense] = kind


for _kind in (LinearKind(), Conv2dKind(), Conv1dKind()):
    register_layer_kind(_kind)


def kind_of(module: nn.Module) -> LayerKind[Any] | None:
    """Return the layer kind of the module's type or of its nearest base class, or None if none is registered."""
    for cls in type(module).__mro__:
        if kind := KINDS.get(cls) or KINDS.get(qualified_name(cls)):
            return kind
    return None


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return ``(out, in)`` of the matrix of a dense layer.

    Raises:
        TypeError: the type of the layer has no layer kind.
    """
    kind = kind_of(module)
    if kind is None:
        raise TypeError(f"a {type(module).__name__} has no layer kind")
    return kind.shape(module)


def linearise(model: nn.Module, names: Iterable[str]) -> None:
    """Replace each named layer that stores its weight as ``(in, out)`` by an equivalent ``nn.Linear``, in place.

    An example is ``Conv1D`` of ``transformers``. ``convert`` does not accept such layers because sharding the first
    dimension of their weight divides ``in``. To restore them, call ``merge`` with the model as it was before.

    Args:
        model: dense model.
        names: layer names, as returned by ``find_targets``. Layers of other kinds are skipped.
    """
    for name in names:
        module: Any = model.get_submodule(name)
        kind = kind_of(module)
        if kind is None or not kind.transposed:
            continue
        out_features, in_features = kind.shape(module)
        linear = nn.Linear(in_features, out_features, device="meta", dtype=module.weight.dtype)
        weight = kind.matrix(module.weight.detach()).contiguous()
        linear.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
        linear.bias = module._parameters.get("bias")
        linear.train(module.training)
        model.set_submodule(name, linear)
