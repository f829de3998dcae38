"""Protocols of the objects that hold the factors, for example an engine or a user's training loop."""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..lowrank.convert import Layout
from ..lowrank.division import Processes
from ..lowrank.event import RankEvent
from ..lowrank.spectrum import DenseRows, Factors


class RowDivision(Protocol):
    """The division of the rows of a tensor among processes.

    Several processes may hold the same row. Each row is *counted* by exactly one of them, so that sums over all
    processes are correct.
    """

    def rows(self, size: int) -> tuple[int, int]:
        """Return the first row and the end (exclusive) of the rows that this process holds, out of ``size`` rows."""
        ...

    def counted_rows(self, size: int) -> tuple[int, int]:
        """Return the first row and the end (exclusive) of the rows that this process counts, a part of ``rows``."""
        ...


class FactorHolder(Protocol):
    """A model whose low-rank layers have factors that are whole or sharded by rows.

    Attributes:
        layout: low-rank layer -> rank and number of modes. Empty while the layers are dense.
        device: device of the factors.
        processes: all processes that hold rows.
    """

    @property
    def layout(self) -> Layout: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def processes(self) -> Processes: ...

    def placement(self, layer: str) -> RowDivision:
        """Return the division of the rows of a layer."""
        ...

    def factors(self) -> Mapping[str, Factors]:
        """Return the counted rows of the factors of every low-rank layer."""
        ...

    def dense_factors(self, layers: Iterable[str]) -> Mapping[str, DenseRows]:
        """Return the counted rows of the weights of dense layers."""
        ...

    def reshape(self, layout: Layout, events: Mapping[str, RankEvent], directions: Callable[[str], Tensor]) -> None:
        """Apply rank events to layers, see ``ReshapableModel.reshape``."""
        ...

    def held_rows(self, layers: Iterable[str]) -> Mapping[str, Factors]:
        """Return all rows of the factors that this process holds. They share memory with the parameters."""
        ...

    def counted(self, layer: str, held: Factors) -> Factors:
        """Select the counted rows from tensors with all held rows, such as those of ``held_rows``."""
        ...

    def set_columns(self, layer: str, first: int, U: Tensor | float, V: Tensor | float) -> None:
        """Overwrite the columns of the factors from ``first`` on, in all rows that this process holds."""
        ...

    def set_base_scale(self, scale: float) -> None:
        """Set the scale ``a`` of every base."""
        ...
