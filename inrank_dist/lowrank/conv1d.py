"""Layer kind of ``transformers``' ``Conv1D``, a linear layer that stores its weight as ``(in, out)``."""

from typing import Any

from torch import Tensor

from .layer import LayerKind, LowRankLayer

CONV1D = "transformers.pytorch_utils.Conv1D"


class Conv1dKind(LayerKind[Any]):
    """``Conv1D`` of ``transformers``, which is not imported. ``linearise`` replaces it by an ``nn.Linear``."""

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
