"""Spectra and factors of the dense layers of a holder."""

from collections.abc import Callable, Mapping

from torch import Tensor

from ..lowrank.dense import DenseColumns, as_rows, dense_columns
from ..lowrank.event import RankEvent
from ..lowrank.spectrum import FactorRows
from ..lowrank.updates import weight_spectra
from .holder import FactorHolder

Shapes = Mapping[str, tuple[int, int]]
"""Layer -> ``(out, in)``."""


def dense_spectra(
    holder: FactorHolder, shapes: Shapes, initial: Callable[[str], Tensor] | None = None
) -> dict[str, Tensor]:
    """Compute the singular values of dense layers, see ``weight_spectra``.

    Args:
        holder: holds the weights.
        shapes: the layers.
        initial: layer -> ``W(0)``, to measure ``W(t) - W(0)`` instead of ``W(t)``.
    """

    def rows(name: str) -> tuple[int, Tensor]:
        return holder.placement(name).counted_rows(shapes[name][0])[0], holder.dense_factors([name])[name].U

    return weight_spectra(rows, shapes, holder.processes, initial)


def dense_factors(holder: FactorHolder, shapes: Shapes) -> dict[str, FactorRows]:
    """Return dense layers as trivial factors with ``R = min(out, in)``. All processes must call it."""
    found: dict[str, FactorRows] = {}
    for name, (out_features, in_features) in shapes.items():
        rows, held = holder.dense_factors([name])[name], holder.placement(name)
        found[name] = rows
        if in_features > out_features:
            ranges = held.counted_rows(out_features), held.counted_rows(in_features)
            found[name] = dense_columns(rows.U, *ranges, (out_features, in_features), holder.processes)
    return found


def events_of_rows(
    events: Mapping[str, RankEvent], factors: Mapping[str, FactorRows], holder: FactorHolder, shapes: Shapes
) -> dict[str, RankEvent]:
    """Convert the freezes of layers with columns in ``factors`` to those of their rows, see ``as_rows``."""
    converted = dict(events)
    for name, event in events.items():
        dense, in_features = factors[name], shapes[name][1]
        if isinstance(dense, DenseColumns):
            first = holder.placement(name).counted_rows(in_features)[0]
            converted[name] = as_rows(event, dense, first, in_features, holder.processes)
    return converted
