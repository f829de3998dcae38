"""A small SVG plotter for lines, steps, references and marks. No scripts; colours are CSS variables."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from itertools import accumulate

from .history import Points

Scale = Callable[[float], float]
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 10, 40
MAX_POINTS = 500
MARK_DISTANCE = 4.0
"""Minimum distance in pixels between marks with the same label. Closer ones are dropped, as they would fill the
plot."""
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(kw_only=True)
class Line:
    """One curve. None in ``points`` is a gap."""

    label: str
    points: Points
    colour: str
    """A CSS variable, such as ``--c0``."""
    tooltip: str = ""
    """Shown when hovering over the curve; defaults to the label."""
    width: float = 1.6
    opacity: float = 1.0
    dash: str = ""
    """An SVG dash pattern; empty: solid."""
    steps: bool = False
    """Whether to hold each value until the next point, as for ranks."""
    dots: bool = False
    """Whether to draw each point, with its value as a tooltip."""
    scales: bool = True
    """Whether the y axis covers all points of this line; otherwise it covers only the middle 98%."""


@dataclass(kw_only=True)
class Mark:
    """A vertical mark at ``x``. Marks with the same ``label`` share a legend entry."""

    x: float
    label: str
    colour: str
    tooltip: str
    dash: str = ""


@dataclass(kw_only=True)
class Reference:
    """A dashed horizontal line with its label written on it."""

    y: float
    label: str


@dataclass(kw_only=True)
class Plot:
    """A plot with one pair of axes. ``svg`` draws it at any width, so that text keeps its size on a phone."""

    title: str
    unit: str = ""
    lines: list[Line]
    marks: list[Mark] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    x_end: float
    from_zero: bool = False
    log: bool = False
    """Use a logarithmic y axis if the values are positive and span more than a factor of 5."""
    x_label: str = "optimizer step"
    x_log: bool = False
    """Use a logarithmic x axis, from the smallest x of the lines to ``x_end``; every x must be positive."""

    @property
    def empty(self) -> bool:
        """Whether there are no points to draw."""
        return not any(value is not None for line in self.lines for _, value in line.points)

    @property
    def scale(self) -> str:
        """``log scale`` if the y axis is logarithmic, else empty."""
        return "log scale" if self._is_log(*self._range()) else ""

    def svg(self, width: int, height: int) -> str:
        """The plot as one ``<svg>`` element of ``width`` x ``height`` CSS pixels."""
        low, high = self._range()
        log = self._is_log(low, high)
        ticks = log_ticks(low, high) if log else linear_ticks(low, high, max(3, height // 42))
        low, high = ticks[0], ticks[-1]
        right, bottom = width - RIGHT, height - BOTTOM
        x_ticks = self._x_ticks(right)
        x_warp: Scale = math.log10 if self.x_log else float
        first, last = (x_warp(x) for x in self._x_range())
        warp: Scale = math.log10 if log else float

        def px(x: float) -> float:
            return LEFT + (x_warp(x) - first) / (last - first) * (right - LEFT)

        def py(y: float) -> float:
            return bottom - (warp(y) - warp(low)) / (warp(high) - warp(low)) * (bottom - TOP)

        # Wider than the axes by the radius of a dot, so that the last dot is not clipped.
        clip = f"clip-{''.join(c for c in self.title.lower() if c.isalnum())}-{width}"
        parts = [
            (
                f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(self._summary())}">'
                f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP - 4}" width="{right - LEFT + 4}" '
                f'height="{bottom - TOP + 4}"/></clipPath>'
            ),
            *_y_axis(ticks, py, right),
            *x_axis(x_ticks, self.x_label, px, LEFT, right, bottom),
            f'<g clip-path="url(#{clip})">',
        ]
        opacity = 1.0 if len(self.marks) <= 20 else 0.4
        drawn: dict[str, float] = {}
        for mark in self.marks:
            x = px(mark.x)
            if x - drawn.get(mark.label, -MARK_DISTANCE) >= MARK_DISTANCE:
                drawn[mark.label] = x
                parts.append(vertical_mark(mark, x, TOP, bottom, opacity))
        for reference in self.references:
            y = py(reference.y)
            parts.append(f'<line class="reference" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        for line in self.lines:
            parts.extend(self._draw(line, px, py, log))
        for reference in self.references:
            y = py(reference.y)
            y += -6 if y > TOP + 18 else 14
            parts.append(
                f'<text class="name" x="{right - 4}" y="{y:.1f}" text-anchor="end">{escape(reference.label)}</text>'
            )
        parts.append("</g></svg>")
        return "".join(parts)

    def _draw(self, line: Line, px: Scale, py: Scale, log: bool) -> list[str]:
        path, dots, pen_down, previous = [], [], False, 0.0
        for x, value in thinned(line.points):
            if value is None or (log and value <= 0):
                pen_down = False
                continue
            at_x, at_y = px(x), py(value)
            if pen_down and line.steps:
                path.append(f"L{at_x:.1f} {previous:.1f}")
            path.append(f"{'L' if pen_down else 'M'}{at_x:.1f} {at_y:.1f}")
            pen_down, previous = True, at_y
            if line.dots:
                tip = escape(f"{line.label}, {self._at(x)}: {value:,.4g}")
                dots.append(
                    f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="2.6" style="fill:var({line.colour})">'
                    f"<title>{tip}</title></circle>"
                )
        if line.steps and pen_down:
            path.append(f"L{px(self.x_end):.1f} {previous:.1f}")
        if not path:
            return []
        stroke = (
            f'style="stroke:var({line.colour})" stroke-width="{line.width}" stroke-opacity="{line.opacity}" '
            f'stroke-dasharray="{line.dash}"'
        )
        tip = f"<title>{escape(line.tooltip or line.label)}</title>"
        return [f'<path class="curve" d="{"".join(path)}" {stroke}>{tip}</path>', *dots]

    def _at(self, x: float) -> str:
        return f"step {x:,.0f}" if self.x_label == "optimizer step" else f"{self.x_label} {x:,.4g}"

    def _x_range(self) -> tuple[float, float]:
        if not self.x_log:
            return 0.0, max(self.x_end, 1)
        low = min(x for line in self.lines for x, _ in line.points)
        return (low, self.x_end) if self.x_end > low else (low / 2, 2 * low)

    def _x_ticks(self, right: int) -> list[float]:
        low, high = self._x_range()
        if not self.x_log:
            return step_ticks(high, right)
        return [tick for tick in log_ticks(low, high) if low * 0.9999 <= tick <= high * 1.0001]

    def _range(self) -> tuple[float, float]:
        """The minimum and maximum y that the axis must cover."""
        values = [reference.y for reference in self.references]
        for line in self.lines:
            finite = sorted(v for _, v in line.points if v is not None and (v > 0 or not self.log))
            if not line.scales and len(finite) > 20:
                finite = finite[len(finite) // 100 : -(len(finite) // 100) or None]
            values += finite[:1] + finite[-1:]
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if self.from_zero and not self.log:
            low = min(low, 0.0)
        if high - low < 1e-9 * max(abs(high), 1e-12):
            margin = abs(high) / 10 or 1.0
            return low - margin, high + margin
        return low, high

    def _is_log(self, low: float, high: float) -> bool:
        return self.log and low > 0 and high > 5 * low

    def _summary(self) -> str:
        ends = []
        for line in self.lines:
            finite = [value for _, value in line.points if value is not None]
            if finite:
                ends.append(f"{line.label} from {finite[0]:.4g} to {finite[-1]:.4g}")
        return f"{self.title}: {'; '.join(ends)}"


def _y_axis(ticks: list[float], py: Scale, right: float) -> list[str]:
    parts = []
    for text, tick in zip(tick_labels(ticks), ticks, strict=True):
        y = py(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    return parts


def vertical_mark(mark: Mark, x: float, top: float, bottom: float, opacity: float) -> str:
    """A mark as a ``<line>`` at pixel ``x``."""
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom:.1f}" stroke-width="1.2" stroke-opacity="{opacity:g}" '
        f'style="stroke:var({mark.colour})" stroke-dasharray="{mark.dash}"><title>{escape(mark.tooltip)}</title></line>'
    )


def step_ticks(x_end: float, right: float) -> list[float]:
    """Round numbers from 0 to ``x_end``, as many as fit an axis that ends at pixel ``right``."""
    return [tick for tick in linear_ticks(0, x_end, max(3, int(right) // 110)) if tick <= x_end * 1.0001]


def x_axis(ticks: list[float], label: str, px: Scale, left: float, right: float, bottom: float) -> list[str]:
    """The x axis with its ticks and label, from pixel ``left`` to pixel ``right``."""
    parts = [f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>']
    for text, tick in zip(tick_labels(ticks), ticks, strict=True):
        x = px(tick)
        # A centred label at the right end would be clipped.
        place, anchor = (right + RIGHT - 1, "end") if x > right - 20 else (x, "middle")
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
            f'<text class="tick" x="{place:.1f}" y="{bottom + 17}" text-anchor="{anchor}">{text}</text>'
        )
    parts.append(f'<text class="tick" x="{right}" y="{bottom + BOTTOM - 6}" text-anchor="end">{escape(label)}</text>')
    return parts


def figure(plot: Plot, height: int, wide: int) -> str:
    """The plot with title and legend: ``wide`` pixels wide on screen and paper, 350 on a phone. Empty if no points."""
    if plot.empty:
        return ""
    entries: dict[str, str] = {}
    for line in plot.lines:
        if line.points:
            entries.setdefault(line.label, legend_entry(line.label, line))
    for mark in plot.marks:
        entries.setdefault(mark.label, legend_entry(mark.label, mark))
    keys = "".join(entries.values())
    legend = f'<span class="legend">{keys}</span>' if len(entries) > 1 else ""
    described = ", ".join(part for part in (plot.unit, plot.scale) if part)
    unit = f' <span class="unit">{escape(described)}</span>' if described else ""
    return (
        f"<figure><figcaption><b>{escape(plot.title)}</b>{unit}{legend}</figcaption>"
        f'<div class="wide">{plot.svg(wide, height)}</div>'
        f'<div class="narrow">{plot.svg(350, min(height, 240))}</div></figure>'
    )


def legend_entry(label: str, drawn: Line | Mark) -> str:
    """A legend entry: a short line in the style of ``drawn``, and the label."""
    ends = 'x1="9" x2="9" y1="0" y2="12"' if isinstance(drawn, Mark) else 'x1="0" x2="18" y1="6" y2="6"'
    faint = f'stroke-opacity="{drawn.opacity}"' if isinstance(drawn, Line) else ""
    return (
        f'<span><svg class="swatch" viewBox="0 0 18 12" aria-hidden="true"><line {ends} stroke-width="2" {faint} '
        f'style="stroke:var({drawn.colour})" stroke-dasharray="{drawn.dash}"/></svg>{escape(label)}</span>'
    )


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers that span ``low`` to ``high``."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, final = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, final + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that span ``low`` to ``high``, at most about ten; below three decades also 2 and 5 times these."""
    first_decade, last_decade = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last_decade - first_decade) / 10))
    decades = range(first_decade, last_decade + stride, stride)
    factors = (1, 2, 5) if high < 1000 * low else (1,)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    first = max(index for index, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    final = min(index for index, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    return ticks[first : final + 1]


def tick_labels(ticks: list[float]) -> list[str]:
    """Labels for all ticks of an axis in one notation: plain, thousands (k), millions (M), or a power of ten."""
    top = max((abs(tick) for tick in ticks), default=0.0)
    if 0 < top < 0.01:
        power = math.floor(math.log10(top) + 1e-9)
        exponent = str(power).translate(_SUPERSCRIPT)
        return [f"{tick / 10.0**power:g}\u00d710{exponent}" if tick else "0" for tick in ticks]
    lowest = min((abs(tick) for tick in ticks if tick), default=1.0)
    if lowest < 1e-4:
        return [_power(tick) for tick in ticks]
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if top >= size:
            scale = 1e3 if suffix == "k" else size
            return [f"{tick / scale:,.6g}{suffix}" if tick else "0" for tick in ticks]
    if top >= 1000:
        return [f"{tick:,.6g}" for tick in ticks]
    digits = max((len(f"{tick:.6g}".partition(".")[2]) for tick in ticks), default=0)
    return [f"{tick:.{digits}f}" for tick in ticks]


def _power(tick: float) -> str:
    """A number as a power of ten with a one-digit factor."""
    if not tick:
        return "0"
    power = math.floor(math.log10(abs(tick)) + 1e-9)
    factor = round(tick / 10.0**power, 6)
    return ("" if factor == 1 else f"{factor:g}\u00d7") + f"10{str(power).translate(_SUPERSCRIPT)}"


def thinned(points: Points, most: int = MAX_POINTS) -> Points:
    """Downsample to about ``most`` points, keeping the minimum and maximum of each stretch."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept: Points = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [point for point in stretch if point[1] is not None]
        if not finite:
            kept.append(stretch[0])
            continue
        ends = (
            min(finite, key=lambda point: point[1] or 0.0),
            max(finite, key=lambda point: point[1] or 0.0),
        )
        kept.extend(sorted(set(ends)))
    return kept


def smoothed(points: Points, reach: int) -> Points:
    """Centred moving average over ``reach`` points on either side.

    The window shrinks symmetrically near the ends, so that the result does not lag. None stays None.
    """
    sums = [0.0, *accumulate(value or 0.0 for _, value in points)]
    counts = [0, *accumulate(int(value is not None) for _, value in points)]
    result: Points = []
    for index, (x, value) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)
        begin, end = index - near, index + near + 1
        total, count = sums[end] - sums[begin], counts[end] - counts[begin]
        result.append((x, None if value is None else total / count))
    return result
