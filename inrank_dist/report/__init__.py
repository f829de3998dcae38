"""Renders a run folder as one self-contained HTML file."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

from ..runtime import yaml_text
from ..runtime.errors import UserError
from ..train.checkpoint import check_run_folder
from ..train.monitors.jsonl import read_metrics
from ..train.monitors.text import amount, number, plural
from . import sections
from .chart import Charts
from .curves import dynamics_figures, loss_figure, rank_figures, threshold_of
from .history import History
from .reading import mode_of, reading
from .style import page
from .timeline import timeline
from .updates import update_figures


def write_report(run_folder: Path, report: Path | None = None) -> Path:
    """Write the report of a run folder, from its metrics and config, and return its path.

    Also works for a run that is still going or was killed, and without a config. The file is written atomically.

    Args:
        report: the file; None: ``report.html`` in the run folder.

    Raises:
        UserError: the folder does not exist, has no records or cannot be read, or the file cannot be written.
    """
    run_folder = Path(run_folder)
    check_run_folder(run_folder)
    history = History(read_metrics(run_folder / "metrics.jsonl"))
    if not history.count:
        raise UserError(f"{run_folder / 'metrics.jsonl'} holds no records; train for at least one logged step")
    content = _page(run_folder, history)
    report = report or run_folder / "report.html"
    temporary = report.with_name(f"{report.name}.tmp")
    try:
        # Sampled text may contain a lone surrogate, which UTF-8 cannot encode.
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(report)
    except OSError as error:
        raise UserError(
            f"{report} cannot be written ({error.strerror or error}); write --output FILE with a file that can"
        ) from None
    return report


def _page(run_folder: Path, history: History) -> str:
    config_file = run_folder / "config.yaml"
    try:
        text = config_file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        text = ""
    except OSError as error:
        raise UserError(f"{config_file} cannot be read ({error.strerror or error}); make it readable") from None
    settings = _settings(text)
    section = settings.get("run")
    configured = section.get("name") if isinstance(section, dict) else None
    name = escape(str(configured or run_folder.resolve().name))
    statements = "".join(f"<li>{escape(sentence)}</li>" for sentence in reading(history, settings))
    charts = Charts([timeline(str(configured or run_folder.resolve().name), history)])
    body = [
        _header(name, history, settings),
        sections.tiles(history),
        f'<h2>Honest reading</h2><div class="reading"><ul>{statements}</ul></div>',
        f"<h2>Training</h2>{charts.controls()}{loss_figure(charts, history)}{dynamics_figures(charts, history)}",
        rank_figures(charts, history, threshold_of(settings)),
        update_figures(history),
        sections.layer_table(history),
        sections.event_table(history),
        sections.samples(history),
        sections.config(text),
        f"<footer>Made from {plural(history.count, 'record')} of metrics.jsonl.</footer>",
        charts.script(),
    ]
    return page(name, body)


def _settings(text: str) -> dict[str, Any]:
    """The config as nested dicts; empty if it cannot be parsed, since its text is shown in any case."""
    try:
        settings = yaml_text.load(text)
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def _header(name: str, history: History, settings: dict[str, Any]) -> str:
    start = history.start
    status = (
        '<span class="status soft">finished</span>'
        if history.ended
        else '<span class="status warn">not finished</span>'
    )
    facts = [str(start.get("model", "")), f"mode {mode_of(history, settings)}"]
    facts += [f"seed {history.first('seed')}"] if history.first("seed") is not None else []
    planned = number(start.get("steps"))
    goal = f" of {planned:,.0f}" if planned and not history.ended else ""
    facts += [f"{history.last_step:,}{goal} steps", f"{amount(history.tokens)} tokens"]
    world = number(history.first("world_size"))
    machine = [plural(int(world), "process")] if world else []
    machine += [str(start[key]) for key in ("device", "engine") if key in start]
    machine += [f"torch {start['torch']}"] if "torch" in start else []
    machine += [f"started {_when(start['time'])}"] if "time" in start else []
    lines = [" · ".join(escape(fact) for fact in line if fact) for line in (facts, machine)]
    return f'<header><h1>{name} {status}</h1><p class="soft">{lines[0]}<br>{lines[1]}</p></header>'


def _when(time: Any) -> str:
    """Format seconds since the epoch as a date; text is returned unchanged."""
    seconds = number(time)
    if seconds is None:
        return str(time)
    return datetime.fromtimestamp(seconds, tz=timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
