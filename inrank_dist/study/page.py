"""The results table of a study, for a terminal and as an HTML file."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from rich.table import Table

from ..report.plot import Line, Plot, figure
from ..report.style import page, text_table
from ..runtime.errors import UserError
from ..runtime.files import write_atomically
from ..runtime.words import plural
from ..train.monitors.text import amount, fixed, operations, size
from .results import Comparison, Row
from .settings import Study, Unit

TITLES: dict[Unit, str] = {"tokens": "Equal tokens", "flops": "Equal FLOPs", "seconds": "Equal time"}

HEADINGS = (
    "variant", "validation loss", "range", "less its control", "", "parameters", "of control", "rank (null)", "FLOPs",
    "seconds", "tokens", "steps", "peak memory", "chosen",
)  # fmt: skip
STYLE = """<style>
main { max-width:1600px }
@page { size:A4 landscape }
@media print { td { max-width:none }
  td:first-child, td:nth-child(5), td:nth-child(14) { white-space:normal; overflow-wrap:anywhere } }
</style>"""
"""For fourteen columns. On paper those of text wrap."""

MOST_SPREAD = 0.1
"""Of step times, as a fraction of the shortest."""

COLOURS = 8
"""Number of line colours of the style sheet."""

PREFIXES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1.0, ""))

TEXT_COLUMNS = (0, 4, 13)
"""Columns that contain text."""


def tables(comparison: Comparison) -> list[Table]:
    """One table for each unit of the budget in which a variant is done."""
    found = []
    for unit, rows in _filled(comparison):
        table = Table(box=None, header_style="bold", pad_edge=False, title=TITLES[unit], title_justify="left")
        for index, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="left" if index in TEXT_COLUMNS else "right", no_wrap=index < 13)
        for row in rows:
            table.add_row(*cells(row))
        found.append(table)
    return found


def _filled(comparison: Comparison) -> list[tuple[Unit, list[Row]]]:
    return [(unit, rows) for unit, rows in comparison.tables.items() if rows]


def cells(row: Row) -> list[str]:
    """A row's cells, in the order of ``HEADINGS``."""
    change = row.difference
    interval = "-"
    if change is not None:
        half = "" if math.isnan(change.half) else f" ± {change.half:.4f}"
        interval = f"{change.mean:+.4f}{half}"
    chosen = ", ".join(f"{key} {value}{' (edge)' if key in row.edges else ''}" for key, value in row.point)
    return [
        row.variant.name,
        fixed(row.mean, 4),
        f"{min(row.losses):.4f} - {max(row.losses):.4f}" if len(row.losses) > 1 else "-",
        interval,
        "" if change is None else f"{change.verdict} ({row.variant.control})",
        amount(row.parameters),
        fixed(row.parameters / row.parameters_root, 2),
        "-" if row.rank is None else f"{row.rank:.1f} ({fixed(row.null_rank, 1)})",
        operations(row.used["flops"]),
        fixed(row.used["seconds"], 1),
        amount(row.used["tokens"]),
        f"{row.steps:,}{' (same runs)' if row.same else ''}",
        size(row.peak_memory),
        chosen,
    ]


def notes(study: Study, comparison: Comparison) -> list[str]:
    """Notes needed to interpret the numbers."""
    seeds, tuning = (", ".join(map(str, each)) for each in (study.seeds, study.tuning_seeds))
    mean = f"Mean over {plural(len(study.seeds), 'seed')} ({seeds})."
    chosen = f"What was tuned was chosen by the mean validation loss over other seeds ({tuning})."
    interval = "Differences are paired by seed, ± half of their 95 % interval (Student's t)."
    sentences = [f"{mean} {chosen} {interval}"]
    if len(comparison.tables) > 1:
        sentences.append(
            "Equal FLOPs and equal time: as many steps as use up the budget, given the use per step of the runs "
            "with equal tokens. A budget of control is what the variant at the end of the chain of controls used. "
            "FLOPs are those of the forward and backward pass, without the optimizer. Time is the training time of a "
            "run; it depends on the machine and on its other load."
        )
    for name, spread in comparison.step_times.items():
        if spread > MOST_SPREAD:
            sentences.append(
                f"Steps of {name} took up to {spread:.0%} longer in one run than in another, so its length at equal "
                "time is not reliable. Measure without other load, and write seconds_per_step in the variant."
            )
    for what, values in comparison.unlike.items():
        sentences.append(f"The runs differ in {what}, which may be why their losses differ: {', '.join(values)}.")
    for unit, names in comparison.missing.items():
        if names:
            sentences.append(f"{TITLES[unit]}: left out, as not all runs are done or one diverged: {'; '.join(names)}.")
    edges = sorted(
        {f"{row.variant.name}: {key}" for rows in comparison.tables.values() for row in rows for key in row.edges}
    )
    if edges:
        sentences.append(f"Chosen at an edge of its grid, so that better may lie beyond: {'; '.join(edges)}.")
    grids = {variant.name: len(variant.points) for variant in study.variants.values()}
    if len({*grids.values()}) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in grids.items())
        sentences.append(f"Not all variants were tuned equally; points of the grids: {counts}.")
    return sentences


def write_results(study: Study, comparison: Comparison) -> tuple[Path, Path]:
    """Write ``study.html`` and ``study.json`` to the study's folder.

    Returns:
        Paths of the two files.

    Raises:
        UserError: the files cannot be written.
    """
    html, record = study.folder / "study.html", study.folder / "study.json"
    try:
        write_atomically(html, _html(study, comparison).encode())
        content = _record(comparison) | {"notes": notes(study, comparison)}
        write_atomically(record, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"{html} cannot be written ({error.strerror or error}); make its folder writable") from None
    return html, record


def _record(comparison: Comparison) -> dict[str, object]:
    return {
        unit: [
            {
                "variant": row.variant.name,
                "control": row.variant.control,
                "chosen": dict(row.point),
                "losses": _finite(row.losses),
                "differences": None if row.difference is None else _finite(row.difference.values),
                "half_interval": None if row.difference is None else _finite([row.difference.half])[0],
                "verdict": None if row.difference is None else row.difference.verdict,
                "steps": row.steps,
                **{key: _finite([value])[0] for key, value in row.used.items()},
                "parameters": row.parameters,
                "peak_memory": _finite([row.peak_memory])[0],
                "rank": row.rank,
                "null_rank": row.null_rank,
            }
            for row in rows
        ]
        for unit, rows in comparison.tables.items()
    }


def _finite(values: Iterable[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _html(study: Study, comparison: Comparison) -> str:
    name = escape(study.file.stem)
    where = f"{escape(os.fspath(study.file))}, base {escape(study.base.name)}"
    body = [STYLE, f'<header><h1>{name}</h1><p class="soft">{where}</p></header>']
    for unit, rows in _filled(comparison):
        body.append(f"<h2>{TITLES[unit]}</h2>")
        body.append(text_table(HEADINGS, map(cells, rows), TEXT_COLUMNS))
    body.append(_plots(comparison))
    statements = "".join(f"<li>{escape(sentence)}</li>" for sentence in notes(study, comparison))
    body.append(f'<h2>How to read it</h2><div class="reading"><ul>{statements}</ul></div>')
    body.append(f"<h2>Study file</h2><pre>{escape(study.text)}</pre>")
    return page(name, body)


def _plots(comparison: Comparison) -> str:
    """What each variant's loss costs: parameters, for the runs with equal tokens, and floating-point operations."""
    compared = [row for rows in comparison.tables.values() for row in rows if not row.same]
    largest = max((row.used["flops"] for row in compared), default=0.0)
    unit, prefix = next((unit, prefix) for unit, prefix in PREFIXES if largest >= unit or not prefix)
    at_equal_tokens = comparison.tables.get("tokens", [])
    plots = [
        _plot("Loss over parameters", "parameters", [(row, row.parameters) for row in at_equal_tokens]),
        _plot("Loss over FLOPs", f"{prefix}FLOPs of a run", [(row, row.used["flops"] / unit) for row in compared]),
    ]
    figures = "".join(figure(plot, height=300, wide=760) for plot in plots)
    return f'<h2>Plots</h2><div class="pair">{figures}</div>' if figures else ""


def _plot(title: str, x_label: str, places: Sequence[tuple[Row, float]]) -> Plot:
    """A dot for the loss of each seed, those of one variant and budget joined by a vertical line."""
    lines: dict[str, Line] = {}
    for row, x in places:
        name, index = row.variant.name, len(lines)
        if name not in lines:
            dash = "3 2" if index // COLOURS % 2 else ""
            lines[name] = Line(label=name, points=[], colour=f"--c{index % COLOURS}", dash=dash, dots=True)
        losses = sorted(loss for loss in row.losses if math.isfinite(loss) and math.isfinite(x))
        lines[name].points += [(x, loss) for loss in losses] + [(x, None)]
    x_end = 1.05 * max((x for _, x in places if math.isfinite(x)), default=1.0)
    return Plot(
        title=title, unit="nats per token, a dot for each seed", lines=[*lines.values()], x_end=x_end, x_label=x_label
    )
