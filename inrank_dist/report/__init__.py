"""Renders a run folder as one self-contained HTML file."""

from __future__ import annotations

from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

from ..runtime.words import plural
from ..train.monitors.text import amount, number
from . import sections
from .chart import Charts
from .control import control_sentence
from .curves import dynamics_figures, loss_figure, rank_figures, threshold_of
from .dense import update_figures, weight_figures
from .history import History
from .reading import mode_of, reading
from .run import Run, read_run, write_page
from .style import page, with_commands
from .timeline import timeline


def write_report(run_folder: Path, report: Path | None = None) -> Path:
    """Write the report of a run folder, from its metrics and config, and return its path.

    Also works for a run that is still going or was killed, and without a config. The file is written atomically.

    Args:
        report: the file; None: ``report.html`` in the run folder.

    Raises:
        UserError: the folder does not exist, has no records or cannot be read, or the file cannot be written.
    """
    run = read_run(run_folder)
    report = report or run.folder / "report.html"
    write_page(report, _page(run))
    return report


def _page(run: Run) -> str:
    history, settings, control = run.history, run.settings, control_sentence(run)
    sentences = reading(history, settings, control)
    statements = "".join(f"<li><bdi>{with_commands(sentence)}</bdi></li>" for sentence in sentences)
    charts = Charts([timeline(run.name, history)])
    body = [
        _header(run.name, history, settings),
        sections.tiles(history),
        f'<h2>Honest reading</h2><div class="reading"><ul>{statements}</ul></div>',
        f"<h2>Training</h2>{charts.controls()}{loss_figure(charts, history)}{dynamics_figures(charts, history)}",
        rank_figures(charts, history, threshold_of(settings)),
        update_figures(charts, history),
        weight_figures(charts, history),
        sections.layer_table(history),
        sections.event_table(history),
        sections.samples(history),
        sections.config(run.config),
        f"<footer>Made from {plural(history.count, 'record')} of metrics.jsonl.</footer>",
        charts.script(),
    ]
    return page(escape(run.name), body)


def _header(name: str, history: History, settings: dict[str, Any]) -> str:
    start = history.start
    status = (
        '<span class="status soft">finished</span>'
        if history.ended
        else '<span class="status warn">not finished</span>'
    )
    facts = [str(start.get("model", "")), f"mode {mode_of(history, settings)}"]
    facts += [f"seed {history.first('seed')}"] if history.first("seed") is not None else []
    goal = "" if history.ended else history.goal
    facts += [f"{history.last_step:,}{goal} steps", f"{amount(history.tokens)} tokens"]
    world = number(history.first("world_size"))
    machine = [plural(int(world), "process")] if world else []
    machine += [str(start[key]) for key in ("device", "engine") if key in start]
    machine += [f"torch {start['torch']}"] if "torch" in start else []
    machine += [f"started {_when(start['time'])}"] if "time" in start else []
    lines = [" · ".join(_fact(fact) for fact in line if fact) for line in (facts, machine)]
    return f'<header><h1><bdi>{escape(name)}</bdi> {status}</h1><p class="soft">{lines[0]}<br>{lines[1]}</p></header>'


def _fact(text: str) -> str:
    return f"<bdi>{escape(text if len(text) <= 80 else text[:79] + '…')}</bdi>"


def _when(time: Any) -> str:
    """Format seconds since the epoch as a date; text is returned unchanged."""
    seconds = number(time)
    if seconds is None:
        return str(time)
    return datetime.fromtimestamp(seconds, tz=timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
