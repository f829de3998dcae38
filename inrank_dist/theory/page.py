"""Writes a result as ``result.json`` and as one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..report.plot import Plot, figure
from ..report.style import page, text_table
from ..runtime.errors import UserError
from ..runtime.files import write_atomically
from .experiment import Cell, Claim, Finished, Table

WIDE, HALF = 1020, 490


def write_result(finished: Finished, folder: Path) -> tuple[Path, Path]:
    """Write ``NAME.html`` and ``result.json`` into ``folder``.

    Returns:
        Paths of the two files.

    Raises:
        UserError: the files cannot be written.
    """
    html, record = folder / f"{finished.name}.html", folder / "result.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(record, (json.dumps(as_record(finished), indent=1, allow_nan=False) + "\n").encode())
        write_atomically(html, as_page(finished).encode())
    except OSError as error:
        raise unwritable(folder, error) from None
    return html, record


def unwritable(folder: Path, error: OSError) -> UserError:
    """The error of an output folder."""
    return UserError(
        f"--output is {folder}, and it cannot be written ({error.strerror or error}); write a folder that can"
    )


def as_record(finished: Finished) -> dict[str, Any]:
    """A result as JSON values. Numbers that are not finite become null."""
    experiment, result = finished.experiment, finished.result
    record = {
        "experiment": finished.name,
        "title": experiment.title,
        "source": experiment.source,
        "formulas": list(experiment.formulas),
        "settings": dataclasses.asdict(finished.settings),
        "claims": [
            dataclasses.asdict(claim) | {"holds": claim.holds, "expected": claim.expected} for claim in result.claims
        ],
        "plots": [
            {
                "title": plot.title,
                "x": plot.x_label,
                "y": plot.unit,
                "lines": [{"label": line.label, "points": line.points} for line in plot.lines],
            }
            for plot in result.plots
        ],
        "tables": [dataclasses.asdict(table) for table in result.tables],
        "notes": list(result.notes),
        "seconds": finished.seconds,
        "machine": finished.machine,
    }
    return _finite(record)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_page(finished: Finished) -> str:
    """A result as HTML."""
    experiment, result = finished.experiment, finished.result
    failed = sum(not claim.holds for claim in result.claims)
    status = "all claims hold" if not failed else f"{failed} of {len(result.claims)} claims do not hold"
    kind = "warn" if failed else "soft"
    notes = "".join(f"<li>{escape(note)}</li>" for note in result.notes)
    formulas = "\n".join(experiment.formulas)
    settings = "\n".join(f"{key}: {_text(value)}" for key, value in dataclasses.asdict(finished.settings).items())
    machine = " · ".join(f"{key} {value}" for key, value in finished.machine.items())
    title = f'{escape(experiment.title)} <span class="status {kind}">{status}</span>'
    body = [
        f'<header><h1>{title}</h1><p class="soft">{escape(experiment.source)}</p></header>',
        f"<p>{escape(experiment.summary)}</p>",
        f"<h2>Formulas</h2><pre>{escape(formulas)}</pre>",
        f"<h2>Claims</h2>{_claims(result.claims)}",
        f'<div class="reading"><ul>{notes}</ul></div>' if notes else "",
        f"<h2>Plots</h2>{_plots(result.plots)}" if result.plots else "",
        *(f"<h2>{escape(table.title)}</h2>{_table(table)}" for table in result.tables),
        f"<h2>Settings</h2><pre>{escape(settings)}</pre>",
        f"<footer>float64 · {finished.seconds:.1f} s · {escape(machine)}</footer>",
    ]
    return page(escape(experiment.title), body)


def claim_cells(claim: Claim) -> list[str]:
    """A claim's cells: statement, expected, measured, verdict."""
    return [claim.statement, claim.expected, _number(claim.measured), "holds" if claim.holds else "does not hold"]


def _claims(claims: Sequence[Claim]) -> str:
    head = ("claim", "expected", "measured", "")
    style = "<style>.claims { margin-bottom:16px } .claims td:first-child { white-space:normal }</style>"
    return f'{style}<div class="claims">{text_table(head, map(claim_cells, claims), (0, 3))}</div>'


def _plots(plots: Sequence[Plot]) -> str:
    """In pairs; of an odd number the first at full width."""
    odd = len(plots) % 2
    small = "".join(figure(plot, height=260, wide=HALF) for plot in plots[odd:])
    wide = "".join(figure(plot, height=340, wide=WIDE) for plot in plots[:odd])
    return wide + (f'<div class="pair">{small}</div>' if small else "")


def _table(table: Table) -> str:
    text_columns = {index for index, cell in enumerate(table.rows[0]) if isinstance(cell, str)} if table.rows else ()
    return text_table(table.columns, [list(map(_cell, row)) for row in table.rows], text_columns)


def _cell(cell: Cell) -> str:
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else f"{cell:,}" if isinstance(cell, int) else _number(cell)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
