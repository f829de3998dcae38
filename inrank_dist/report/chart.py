"""Interactive plots of one or several runs: overlaid curves on a choice of x axes, with values under the pointer.

The Python side collects plain data. The browser draws it (``chart.js``), so that plots fit the window and can change
their axis. Nothing is loaded from elsewhere.

One run::

    charts = Charts([timeline("my run", history)])
    loss = charts.figure(Chart(title="Loss", unit="nats per token", lines=[Line(label="train", points=points)]))
    page(name, [charts.controls(), loss, charts.script()])

Several runs overlaid: one ``Timeline`` for each, and lines that say by ``run`` to which of them they belong. Each line
is placed on the axes by its own run, so that runs with other batch sizes or other machines can be compared by tokens,
FLOPs and time::

    charts = Charts([timeline(name, history) for name, history in runs.items()])
    lines = [
        Line(label=name, points=history.eval_curve("loss"), run=index, colour=COLOURS[index % len(COLOURS)])
        for index, (name, history) in enumerate(runs.items())
    ]
    charts.figure(Chart(title="Validation loss", lines=lines, marks=False))

A mean with its range is a line with ``low`` and ``high``. The curves of seeds have the same steps, so the mean can use
the timeline of any of them, or one made for the group. Events are drawn for the runs of the lines in a chart.
``Line.points`` are thinned to ``most`` points with all extremes kept; lower it for pages of many runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from .history import Points
from .plot import Reference, thinned
from .timeline import AXES, Timeline

COLOURS = ("--c0", "--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7")
"""Colours that can be told apart on light and dark pages, as CSS variables."""

MOST_POINTS = 2000
AXIS_NAMES = {"step": "steps", "tokens": "tokens", "flops": "FLOPs", "seconds": "time"}
SCRIPTS = ("chart.js", "maps.js", "spectra.js")


@dataclass(kw_only=True)
class Line:
    """One curve. None in ``points`` is a gap.

    Attributes:
        label: name in the legend, plain text. Lines with the same label share a legend entry and a colour.
        points: x and y. x is an optimizer step, or the quantity of ``Chart.x``.
        run: index of the run that places the steps on the axes.
        colour: a CSS variable, such as ``--c0``.
        dash: an SVG dash pattern; empty: solid.
        faint: draw it in the background, and let the y axis cover only the middle 98% of its values.
        hold: hold each value until the next point, as for ranks.
        dots: draw each point.
        low, high: y values of a band around the curve, as many as ``points``; empty: no band.
    """

    label: str
    points: Points
    run: int = 0
    colour: str = "--c0"
    width: float = 1.6
    dash: str = ""
    faint: bool = False
    hold: bool = False
    dots: bool = False
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


@dataclass(kw_only=True)
class Chart:
    """A plot with one pair of axes.

    Attributes:
        title, unit: shown above the plot, plain text.
        lines: the curves; those without values are left out.
        references: dashed horizontal lines with their labels.
        marks: whether to draw the events of the runs of the lines.
        from_zero: the y axis begins at 0.
        log: logarithmic y axis if the values are positive and span more than a factor of 5.
        x: label of the x axis of a plot that is not over training; empty: the axis that the reader chooses.
        x_log: logarithmic x axis, for ``x``.
        height: of the plot in CSS pixels.
    """

    title: str
    unit: str = ""
    lines: list[Line]
    references: list[Reference] = field(default_factory=list)
    marks: bool = True
    from_zero: bool = False
    log: bool = False
    x: str = ""
    x_log: bool = False
    height: int = 220


class Charts:
    """Collects the plots of a page and their data.

    Args:
        runs: the runs that lines refer to by index.
        most: maximum number of points of a line, about.
    """

    def __init__(self, runs: Sequence[Timeline], most: int = MOST_POINTS) -> None:
        self._runs, self._most = runs, most
        self._charts: list[dict[str, Any]] = []
        self._more: dict[str, list[Any]] = {}

    def controls(self, *, events: bool = True) -> str:
        """Buttons that choose the x axis of all plots over training, and the legend of the events in them.

        May be placed at several points of a page, such as below the headings of its sections.

        Args:
            events: whether to show the legend of the events.
        """
        known = [axis for axis in AXES if any(axis in run.axes for run in self._runs)]
        buttons = "".join(
            f'<button type="button" data-axis="{axis}" aria-pressed="{str(axis == "step").lower()}">'
            f"{AXIS_NAMES[axis]}</button>"
            for axis in known
        )
        choice = f'<div class="choice" role="group" aria-label="x axis">{buttons}</div>' if len(known) > 1 else ""
        marks = {mark.label: mark for run in self._runs for mark in run.marks} if events else {}
        legend = "".join(key(mark.label, mark.colour, mark.dash, upright=True) for mark in marks.values())
        legend = f'<span class="legend">{legend}</span>' if legend else ""
        return f'<div class="controls">{choice}{legend}</div>' if choice or legend else ""

    def figure(self, chart: Chart) -> str:
        """The plot as HTML; empty if it has no values."""
        lines = [line for line in chart.lines if any(value is not None for _, value in line.points)]
        if not lines:
            return ""
        runs = sorted({line.run for line in lines})
        entries: dict[str, str] = {}
        for line in lines:
            entries.setdefault(line.label, key(line.label, line.colour, line.dash, faint=line.faint))
        if len(entries) < 2:
            entries = {}
        self._charts.append(
            {
                "title": chart.title,
                "lines": [self._line(line) for line in lines],
                "references": [{"y": digits(each.y), "label": each.label} for each in chart.references],
                "marks": runs if chart.marks and not chart.x else [],
                "zero": chart.from_zero,
                "log": chart.log,
                "x": chart.x,
                "xLog": chart.x_log,
                "height": chart.height,
            }
        )
        return frame(chart.title, chart.unit, entries.values(), f'data-chart="{len(self._charts) - 1}"', chart.height)

    def add(self, kind: str, data: Any) -> int:
        """Add data of another kind of plot to the page. Returns its index among those of this kind."""
        self._more.setdefault(kind, []).append(data)
        return len(self._more[kind]) - 1

    def script(self) -> str:
        """The data of all plots and the code that draws them; the last part of the page."""
        runs = [
            {
                "name": run.name,
                "axes": {axis: [digits(value, 9) for value in values] for axis, values in run.axes.items()},
                "marks": [
                    {"x": mark.x, "label": mark.label, "colour": mark.colour, "dash": mark.dash, "tip": mark.tooltip}
                    for mark in run.marks
                ],
            }
            for run in self._runs
        ]
        return scripts({"runs": runs, "charts": self._charts, **self._more})

    def _line(self, line: Line) -> dict[str, Any]:
        band = list(zip(line.low, line.high, strict=True))
        kept = thinned([(index, value) for index, (_, value) in enumerate(line.points)], self._most)
        # The ends of a curve are always kept, so that it does not seem shorter than it is.
        at = sorted({0, len(line.points) - 1, *(int(index) for index, _ in kept)})
        return {
            "label": line.label,
            "run": line.run,
            "colour": line.colour,
            "width": line.width,
            "dash": line.dash,
            "faint": line.faint,
            "hold": line.hold,
            "dots": line.dots,
            "x": [digits(line.points[index][0], 9) for index in at],
            "y": [digits(line.points[index][1]) for index in at],
            "low": [digits(band[index][0]) for index in at] if band else [],
            "high": [digits(band[index][1]) for index in at] if band else [],
        }


def frame(title: str, unit: str, entries: Iterable[str], attributes: str, height: int) -> str:
    """A figure with an empty box that the page's scripts fill.

    Args:
        title, unit: plain text.
        entries: of the legend, such as ``key``.
        attributes: HTML attributes by which the scripts know the box.
        height: of the box in CSS pixels.
    """
    shown = f' <span class="unit">{escape(unit)}</span>' if unit else ""
    joined = "".join(entries)
    legend = f'<span class="legend">{joined}</span>' if joined else ""
    return (
        f"<figure><figcaption><b><bdi>{escape(title)}</bdi></b>{shown}{legend}</figcaption>"
        f'<div class="plot" {attributes} tabindex="0" style="min-height:{height}px"></div></figure>'
    )


def scripts(data: dict[str, Any]) -> str:
    """The data as JSON and our scripts as HTML. No text of the data can end the element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    code = "\n".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in SCRIPTS)
    return (
        '<noscript><p class="warn">The plots of this page are drawn by its JavaScript, which is switched off.</p>'
        f'</noscript><script type="application/json" id="page-data">{text}</script><script>{code}\nstart();\n</script>'
    )


def digits(value: float | None, count: int = 6) -> float | int | None:
    """A number rounded to significant digits, as an int if it is one, for short JSON."""
    if value is None:
        return None
    rounded = float(f"{value:.{count}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def key(label: str, colour: str, dash: str = "", *, upright: bool = False, faint: bool = False) -> str:
    """A legend entry, which shows and hides what it names."""
    path, opacity = "M9 0V12" if upright else "M0 6H18", ' stroke-opacity="0.4"' if faint else ""
    return (
        f'<button type="button" class="key" data-label="{escape(label)}" aria-pressed="true" title="{escape(label)}">'
        f'<svg class="swatch" viewBox="0 0 18 12" aria-hidden="true"><path d="{path}" stroke-width="2"{opacity} '
        f'style="stroke:var({colour})" stroke-dasharray="{dash}"/></svg><bdi>{escape(label)}</bdi></button>'
    )
