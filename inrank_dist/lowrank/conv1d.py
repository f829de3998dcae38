"""``Conv1D`` of ``transformers``: a linear layer that stores its weight as ``(in, out)``."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .layer import LayerKind, LowRankLayer, qualified_name

CONV1D = "transformers.pytorch_utils.Conv1D"


class Conv1dKind(LayerKind[Any]):
    """``Conv1D`` of ``transformers``, which is not imported. ``linearise`` makes an ``nn.Linear`` of it."""

    dense = CONV1D
    transposed = True

    def shape(self, module: Any) -> tuple[int, int]:
        return module.nf, module.nx

    def make(self, module: Any, modes: int, base: bool) -> LowRankLayer:
        raise TypeError("a Conv1D cannot be converted; call linearise first")

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def restore(self, module: Any, matrix: Tensor) -> Tensor:
        return matrix.T


def linearise(model: nn.Module, names: Iterable[str]) -> None:
    """Replace each ``Conv1D`` among the named layers by the ``nn.Linear`` that does the same, in place.

    Needed before ``convert``: the rows of a ``Conv1D`` weight that a process holds are rows of ``in``. ``merge`` with
    the model as it was before gives the ``Conv1D`` back.

    Args:
        names: from ``find_targets``; layers of other types stay as they are.
    """
    for name in names:
        module = model.get_submodule(name)
        if not any(qualified_name(cls) == CONV1D for cls in type(module).__mro__):
            continue
        source: Any = module
        linear = nn.Linear(source.nx, source.nf, device="meta", dtype=source.weight.dtype)
        weight = source.weight.detach().T.contiguous()
        linear.weight = nn.Parameter(weight, requires_grad=source.weight.requires_grad)
        linear.bias = source.bias
        linear.train(source.training)
        model.set_submodule(name, linear)
