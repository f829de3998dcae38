"""What a rank method needs of whatever holds the factors: an engine, somebody's own training loop, a test."""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..lowrank.convert import Layout
from ..lowrank.division import Processes
from ..lowrank.event import RankEvent
from ..lowrank.spectrum import DenseRows, Factors


class RowDivision(Protocol):
    """Which rows of a tensor a process holds."""

    def rows(self, size: int) -> tuple[int, int]:
        """First row and end of the rows that this process holds of ``size``."""
        ...

    def counted_rows(self, size: int) -> tuple[int, int]:
        """The part of ``rows`` that this process alone counts: over all processes every row exactly once."""
        ...


class FactorHolder(Protocol):
    """Holds the factors of low-rank layers, whole or by rows.

    Attributes:
        layout: low-rank layer -> its rank and number of modes; empty while the layers are dense.
        device: of the factors.
        processes: all processes that hold rows.
    """

    @property
    def layout(self) -> Layout: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def processes(self) -> Processes: ...

    def placement(self, layer: str) -> RowDivision:
        """How the rows of a layer are divided."""
        ...

    def factors(self) -> Mapping[str, Factors]:
        """Rows of every low-rank layer's factors that this process alone counts."""
        ...

    def dense_factors(self, layers: Iterable[str]) -> Mapping[str, DenseRows]:
        """Rows of dense layers' weights that this process alone counts."""
        ...

    def reshape(self, layout: Layout, events: Mapping[str, RankEvent], directions: Callable[[str], Tensor]) -> None:
        """Change the shapes of layers, as ``ReshapableModel.reshape``."""
        ...

    def held_rows(self, layers: Iterable[str]) -> Mapping[str, Factors]:
        """All rows of the factors of layers that this process holds, counted or not; they share memory with it."""
        ...

    def counted(self, layer: str, held: Factors) -> Factors:
        """Of rows such as those of ``held_rows``, those that this process alone counts."""
        ...

    def set_columns(self, layer: str, first: int, U: Tensor | float, V: Tensor | float) -> None:
        """Overwrite the columns from ``first`` on of this process's rows of a layer's factors."""
        ...

    def set_base_scale(self, scale: float) -> None:
        """Set the factor ``a`` of every base."""
        ...
