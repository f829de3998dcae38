"""A run as one SVG image for pages of Markdown: its loss, and its ranks beside their null ranks."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from .history import History
from .plot import Line, Plot
from .run import read_run, write_page
from .style import STYLE
from .timeline import marks

WIDTH, HEIGHT, HEAD, MARGIN = 820, 240, 36, 12
"""Width and height of one plot, height of the line above it, and the margin on both sides, in pixels."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
CLASSES = ("grid", "axis", "curve", "reference", "tick", "name")
"""Classes of the style sheet that plots use."""


def write_picture(run_folder: Path, file: Path) -> Path:
    """Draw the loss and the mean rank of a run over its optimizer steps into an SVG file, and return its path.

    The image carries its colours for light and dark screens, so it can be shown anywhere, for example with
    ``<img src="run.svg">``. A run without low-rank layers has its loss only. The file is written atomically.

    Raises:
        UserError: the folder does not exist, has no records or cannot be read, or the file cannot be written.
    """
    run = read_run(run_folder)
    plots = [plot for plot in (_loss(run.history), _ranks(run.history)) if not plot.empty]
    parts = [_panel(plot, index * (HEAD + HEIGHT)) for index, plot in enumerate(plots)]
    wide, high = WIDTH + 2 * MARGIN, len(plots) * (HEAD + HEIGHT) + MARGIN
    write_page(
        file,
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}" '
        f'font-family="{FONT}"><title>{escape(run.name)}</title><style>{_style()}</style>'
        f'<rect width="{wide}" height="{high}" rx="8" fill="var(--paper)"/>{"".join(parts)}</svg>\n',
    )
    return file


def _loss(history: History) -> Plot:
    train = Line(label="training", points=history.curve("loss"), colour="--c0", width=1.4, scales=False)
    validation = Line(label="validation", points=history.eval_curve("loss"), colour="--c1", width=2, dots=True)
    return Plot(
        title="Loss", unit="nats per token", lines=[train, validation], marks=marks(history), x_end=history.last_step
    )


def _ranks(history: History) -> Plot:
    rank = Line(label="rank", points=history.means["rank"], colour="--c2", width=2.2, steps=True)
    null = Line(label="null rank", points=history.means["null_rank"], colour="--c7", dash="5 4", steps=True)
    return Plot(
        title="Mean rank",
        unit="over all low-rank layers",
        lines=[rank, null],
        marks=marks(history),
        x_end=history.last_step,
        from_zero=True,
    )


def _panel(plot: Plot, top: int) -> str:
    """The plot below a line with its title, its unit and its legend. The first plot's legend has the events as well."""
    drawn = [(line.label, line.colour, line.dash) for line in plot.lines if line.points]
    if not top:
        drawn += [*{(mark.label, mark.colour, mark.dash): None for mark in plot.marks}]
    legend, right = [], WIDTH + MARGIN
    for label, colour, dash in reversed(drawn):
        right -= 7 * len(label) + 40
        legend.append(
            f'<line x1="{right}" x2="{right + 20}" y1="{top + 20}" y2="{top + 20}" stroke-width="2" '
            f'style="stroke:var({colour})" stroke-dasharray="{dash}"/>'
            f'<text class="tick" x="{right + 26}" y="{top + 24}">{escape(label)}</text>'
        )
    title = f'<tspan font-weight="600">{escape(plot.title)}</tspan> <tspan class="tick">{escape(plot.unit)}</tspan>'
    placed = f'<svg x="{MARGIN}" y="{top + HEAD}" width="{WIDTH}" height="{HEIGHT}" '
    return (
        f'<text x="{MARGIN + 6}" y="{top + 25}" font-size="15" fill="var(--ink)">{title}</text>{"".join(legend)}'
        + plot.svg(WIDTH, HEIGHT).replace("<svg ", placed, 1)
    )


def _style() -> str:
    """The colours of the style sheet, light and dark, and its rules for plots."""
    colours = STYLE[: STYLE.index("* {")]
    rules = re.findall(rf"^\.(?:{'|'.join(CLASSES)})\b.*\}}$", STYLE, re.MULTILINE)
    return "".join([colours, *rules]).strip()
