"""Heat maps of a quantity of every layer over training, one row per layer, for a few or hundreds of layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ..runtime.words import plural
from .chart import Charts, digits, frame
from .history import History, Layer, Points

LEVELS = 7
"""Number of colours in the scale, ``--h1`` (low) to ``--h7`` (high). ``--h0`` is for the initial rank."""

COLUMNS = 240
"""Maximum number of columns per row."""

MARGINS, HEADING = 56, 18
QUANTITIES = (
    ("rank", "Rank of every layer"),
    ("found", "Rank found"),
    ("explained", "Explained ratio"),
    ("effective_rank", "Effective rank"),
)


def heat_maps(charts: Charts, history: History, run: int = 0) -> str:
    """Maps of the rank, the rank found, the explained ratio and the effective rank.

    Layers of the same kind are grouped, so that they can be compared; within a group they are in the model's order.
    Values under the pointer are those of all quantities, and of the null rank.
    """
    layers = _grouped(history.layers.values())
    if not any(layer.rank for layer in layers):
        return ""
    end = max(history.last_step, 1)
    row = row_height(len(layers))
    height = MARGINS + HEADING * len({layer.kind for layer in layers}) + row * len(layers)
    quantities, figures = [], []
    start_rank = history.start_rank
    for key, title in QUANTITIES:
        rows = [spans(getattr(layer, key), end) for layer in layers]
        values = sorted({rounded(value) for each in rows for _, _, value in each})
        if not values:
            continue
        scale = Scale(values, start_rank if key == "rank" else None)
        unit = f"{plural(len(layers), 'layer')}, by kind" if key == "rank" else ""
        figures.append((title, unit, scale.legend()))
        quantities.append({"key": key, "title": title, "low": scale.low, "high": scale.high, "start": scale.start})
        quantities[-1]["rows"] = [_row(each) for each in rows]
    nulls = [_row(spans(layer.null_rank, end)) for layer in layers]
    index = charts.add(
        "maps",
        {
            "run": run,
            "row": row,
            "layers": [{"name": layer.name, "kind": layer.kind, "number": _number(layer)} for layer in layers],
            "quantities": quantities,
            "nulls": nulls,
        },
    )
    return "".join(
        frame(title, unit, [legend], f'data-map="{index}" data-quantity="{at}"', round(height))
        for at, (title, unit, legend) in enumerate(figures)
    )


class Scale:
    """Maps values to colour numbers.

    Args:
        values: all values, increasing.
        start: the value with a colour of its own, or None.
    """

    def __init__(self, values: Sequence[float], start: float | None) -> None:
        found = [value for value in values if value != start]
        self.start = start if len(found) < len(values) else None
        self.low, self.high = (found[0], found[-1]) if found else (0.0, 0.0)
        self.has_levels = bool(found)

    def legend(self) -> str:
        entries = [_patch([0]) + f"{self.start:g}, the start"] if self.start is not None else []
        if self.has_levels:
            ends = f"{self.low:,.4g}" if self.low == self.high else f"{self.low:,.4g} to {self.high:,.4g}"
            entries.append(_patch(range(1, LEVELS + 1) if self.low < self.high else [LEVELS // 2 + 1]) + ends)
        return "".join(f"<span>{entry}</span>" for entry in entries)


def _patch(levels: Sequence[int]) -> str:
    boxes = "".join(f'<rect class="h{level}" x="{10 * at}" width="10" height="10"/>' for at, level in enumerate(levels))
    width = 10 * len(levels)
    return f'<svg class="patch" viewBox="0 0 {width} 10" style="width:{width}px" aria-hidden="true">{boxes}</svg>'


def row_height(layers: int) -> float:
    """Height of a row in pixels: tall enough for a label with few layers, and about a page in total with hundreds."""
    return 13.0 if layers <= 48 else max(2.0, 624 / layers)


def spans(points: Points, x_end: float) -> list[tuple[float, float, float]]:
    """Segments ``(from, to, value)`` of a row, the last one ending at ``x_end``; at most ``COLUMNS``.

    Changes within one column are merged into the value at the column's end.
    """
    width = x_end / COLUMNS
    result: list[tuple[float, float, float]] = []
    for index, (x, value) in enumerate(points):
        end = points[index + 1][0] if index + 1 < len(points) else x_end
        if value is None or end <= x:
            continue
        begin = result[-1][1] if result and result[-1][1] > x else x
        end = max(end, begin)
        if result and end - result[-1][0] < width:
            result[-1] = (result[-1][0], end, value)
        elif end > begin:
            result.append((begin, end, value))
    return result


def _grouped(layers: Iterable[Layer]) -> list[Layer]:
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.kind, []).append(layer)
    return [layer for group in groups.values() for layer in group]


def rounded(value: float) -> float:
    """A value of a cell with four significant digits."""
    return digits(value, 4) or 0


def _row(row: list[tuple[float, float, float]]) -> dict[str, list[float | int | None]]:
    """The steps at which the spans of a row begin, and their values."""
    return {"x": [digits(begin, 9) for begin, _, _ in row], "v": [rounded(value) for _, _, value in row]}


def _number(layer: Layer) -> str:
    """The numbers in a layer's name, which distinguish it from others of its kind."""
    return escape(".".join(part for part in layer.name.split(".") if part.isdigit()))
