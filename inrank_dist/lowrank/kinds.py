"""Which dense layers a low-rank layer can stand for: the registry of layer kinds."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from .conv import Conv2dKind
from .conv1d import Conv1dKind
from .layer import LayerKind, qualified_name
from .linear import LinearKind

KINDS: dict[type[nn.Module] | str, LayerKind[Any]] = {}
"""Type of a dense layer, or its qualified name -> kind."""


def register_layer_kind(kind: LayerKind[Any]) -> None:
    """Make one more type of dense layer known.

    Raises:
        ValueError: there is a kind for this type.
    """
    if kind.dense in KINDS:
        raise ValueError(f"{kind.dense} has a layer kind already, {type(KINDS[kind.dense]).__name__}")
    KINDS[kind.dense] = kind


for _kind in (LinearKind(), Conv2dKind(), Conv1dKind()):
    register_layer_kind(_kind)


def kind_of(module: nn.Module) -> LayerKind[Any] | None:
    """The kind of the module's type, or else of its nearest base class that has one; None: it has none."""
    for cls in type(module).__mro__:
        if kind := KINDS.get(cls) or KINDS.get(qualified_name(cls)):
            return kind
    return None


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of a dense layer's matrix.

    Raises:
        TypeError: its type has no layer kind.
    """
    kind = kind_of(module)
    if kind is None:
        raise TypeError(f"a {type(module).__name__} has no layer kind")
    return kind.shape(module)


def linearise(model: nn.Module, names: Iterable[str]) -> None:
    """Replace each named layer whose weight is ``(in, out)``, such as ``Conv1D`` of ``transformers``, by the
    ``nn.Linear`` that does the same, in place.

    Needed before ``convert``: the rows of such a weight that a process holds are rows of ``in``. ``merge`` with the
    model as it was before gives the layer back.

    Args:
        names: from ``find_targets``; other layers stay as they are.
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
