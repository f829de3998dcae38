"""A heat map of the rank of every layer over time, one row per layer, readable for a few or hundreds of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from ..train.monitors.text import fixed, plural
from .history import Layer, Points
from .plot import BOTTOM, Mark, legend_entry, step_ticks, vertical_mark, x_axis

LEVELS = 7
"""Number of colours in the scale, ``--h1`` (low) to ``--h7`` (high). ``--h0`` is for the initial rank."""

COLUMNS = 240
"""Maximum number of columns per row."""

LABEL_HEIGHT = 12
HEADING = 18
MARK_SPACE = 6


@dataclass(kw_only=True)
class HeatMap:
    """Ranks of layers over optimizer steps.

    Layers of the same kind are grouped, so that they can be compared; within a group they are in the model's order.

    Attributes:
        layers: all layers; layers with the same ``kind`` form a group.
        notes: layer -> text to the right of its row, if there is room, and in its tooltip.
        start_rank: the layers' initial rank, drawn in a separate colour; None if unknown.
        marks: vertical marks, as in the other plots.
        x_end: last step.
    """

    layers: Sequence[Layer]
    notes: Mapping[str, str]
    start_rank: float | None
    marks: list[Mark] = field(default_factory=list)
    x_end: float

    def figure(self, wide: int, narrow: int) -> str:
        """The map with title and legend: ``wide`` pixels wide on screen and paper, ``narrow`` on a phone."""
        ranks = sorted({value for layer in self.layers for _, value in layer.rank if value is not None})
        if not ranks:
            return ""
        scale = _Scale(ranks, self.start_rank)
        marks = {mark.label: legend_entry(mark.label, mark) for mark in self.marks}
        title = f'<b>Rank of every layer</b> <span class="unit">{plural(len(self.layers), "layer")}'
        return (
            f'<figure><figcaption>{title}, by kind, in the order of the model</span><span class="legend">'
            f"{scale.legend()}{''.join(marks.values())}</span></figcaption>"
            f'<div class="wide">{self._svg(scale, wide)}</div>'
            f'<div class="narrow">{self._svg(scale, narrow)}</div></figure>'
        )

    def _svg(self, scale: _Scale, width: int) -> str:
        groups: dict[str, list[Layer]] = {}
        for layer in self.layers:
            groups.setdefault(layer.kind, []).append(layer)
        row = row_height(len(self.layers))
        is_wide = width > 600
        has_notes = is_wide and row >= LABEL_HEIGHT
        left, right = 64 if is_wide else 34, width - (104 if has_notes else 14)
        bottom = MARK_SPACE + HEADING * len(groups) + row * len(self.layers)
        x_end = max(self.x_end, 1)

        def px(x: float) -> float:
            return left + min(x / x_end, 1.0) * (right - left)

        cells: dict[int, list[str]] = {}
        texts, rows = [], []
        y = float(MARK_SPACE)
        for kind, layers in groups.items():
            texts.append(f'<text class="group" x="{left}" y="{y + 13:.1f}">{escape(kind)}</text>')
            y += HEADING
            free_from = y - 1
            for layer in layers:
                for first, last, value in spans(layer.rank, x_end):
                    x0, x1 = px(first), px(last)
                    # Slightly taller than the row, or gaps between rows would be visible.
                    shape = f"M{x0:.1f} {y:.1f}H{x1:.1f}V{y + row + (0.3 if row < 6 else -1):.1f}H{x0:.1f}Z"
                    cells.setdefault(scale.level(value), []).append(shape)
                rows.append(self._tooltip(layer, y, left, right, row))
                if y >= free_from:
                    middle = y + row / 2 + 4
                    place = f'y="{middle:.1f}"'
                    texts.append(f'<text class="tick" x="{left - 6}" {place} text-anchor="end">{_number(layer)}</text>')
                    if has_notes:
                        note = escape(self.notes.get(layer.name, ""))
                        texts.append(f'<text class="tick" x="{right + 6}" {place}>{note}</text>')
                    free_from = y + LABEL_HEIGHT
                y += row
        paths = "".join(f'<path class="h{level}" d="{"".join(shapes)}"/>' for level, shapes in sorted(cells.items()))
        marks = "".join(vertical_mark(mark, px(mark.x), MARK_SPACE, bottom, 1.0) for mark in self.marks)
        axis = x_axis(step_ticks(x_end, right), "optimizer step", px, left, right, bottom)
        heading = ""
        if has_notes:
            heading = f'<text class="tick" x="{right + 6}" y="{MARK_SPACE + 13}">rank (null)</text>'
        return (
            f'<svg class="heat" viewBox="0 0 {width} {bottom + BOTTOM:.0f}" role="img" '
            f'aria-label="{escape(self._summary())}">{paths}{marks}{"".join(rows)}{heading}{"".join(texts)}'
            f"{''.join(axis)}</svg>"
        )

    def _tooltip(self, layer: Layer, y: float, left: float, right: float, row: float) -> str:
        values = [value for _, value in layer.rank if value is not None]
        path = " → ".join(fixed(value, 0) for value in (values if len(values) <= 8 else [*values[:3], *values[-4:]]))
        tip = escape(f"{layer.name}: {path}; now {self.notes.get(layer.name, '')}")
        return (
            f'<rect class="row" x="{left}" y="{y:.1f}" width="{right - left}" height="{row:.1f}">'
            f"<title>{tip}</title></rect>"
        )

    def _summary(self) -> str:
        first = [value for layer in self.layers if (value := _end(layer.rank[:1])) is not None]
        last = [value for layer in self.layers if (value := _end(layer.rank)) is not None]
        return (
            f"Rank of {plural(len(self.layers), 'layer')} over time: from {min(first):g} to {max(first):g} at first, "
            f"from {min(last):g} to {max(last):g} at the end"
        )


class _Scale:
    """Maps ranks to colour numbers."""

    def __init__(self, ranks: Sequence[float], start: float | None) -> None:
        self.start = start
        found = [rank for rank in ranks if rank != start]
        self.low, self.high = (found[0], found[-1]) if found else (0.0, 0.0)
        self.has_start = len(found) < len(ranks)
        self.levels = sorted({self.level(rank) for rank in found})

    def level(self, rank: float) -> int:
        """0 for the initial rank, else 1 to ``LEVELS``."""
        if rank == self.start:
            return 0
        if self.high == self.low:
            return LEVELS // 2 + 1
        return 1 + min(int((rank - self.low) / (self.high - self.low) * LEVELS), LEVELS - 1)

    def legend(self) -> str:
        entries = [_patch([0]) + f"{self.start:g}, the start"] if self.has_start else []
        if self.levels:
            ends = f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"
            levels = range(1, LEVELS + 1) if self.low < self.high else self.levels
            entries.append(_patch(levels) + ends)
        return "".join(f"<span>{entry}</span>" for entry in entries)


def _patch(levels: Sequence[int]) -> str:
    boxes = "".join(f'<rect class="h{level}" x="{10 * at}" width="10" height="10"/>' for at, level in enumerate(levels))
    width = 10 * len(levels)
    return f'<svg class="patch" viewBox="0 0 {width} 10" style="width:{width}px" aria-hidden="true">{boxes}</svg>'


def row_height(layers: int) -> float:
    """Height of a row in pixels: tall enough for a label with few layers, and about a page in total with hundreds."""
    return 15.0 if layers <= 48 else max(3.0, 720 / layers)


def spans(points: Points, x_end: float) -> list[tuple[float, float, float]]:
    """Segments ``(from, to, rank)`` of a row, the last one ending at ``x_end``; at most ``COLUMNS``.

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


def _number(layer: Layer) -> str:
    """The numbers in a layer's name, which distinguish it from others of its kind."""
    return escape(".".join(part for part in layer.name.split(".") if part.isdigit()))


def _end(points: Points) -> float | None:
    return points[-1][1] if points else None
