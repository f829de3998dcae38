"""A run as plain data for plots: where each of its steps lies on the axes, and what happened there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..runtime.words import plural
from ..train.monitors.text import number
from .history import History
from .plot import Mark

AXES = ("step", "tokens", "flops", "seconds")
"""The x axes of curves: optimizer steps, tokens, floating-point operations, and seconds of training."""

KNOTS = 1000
"""Maximum number of steps at which the positions on the other axes are stored; between them they are interpolated."""

MARK_STYLE = {"grow": ("growth", "--c2", "2 3"), "freeze": ("freeze", "--c0", "")}


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Places the steps of one run on the axes, for a ``Chart``, whose points are at optimizer steps.

    Attributes:
        name: name of the run, plain text.
        axes: axis of ``AXES`` -> positions, increasing, all of the same length. ``step`` is always there. An axis that
            the run did not record is missing.
        marks: events, at steps.
    """

    name: str = ""
    axes: dict[str, list[float]]
    marks: list[Mark] = field(default_factory=list)


def timeline(name: str, history: History) -> Timeline:
    """The timeline of a run, with all of its events as marks. Records of earlier versions have no FLOPs and seconds."""
    columns = {axis: history.curve(axis) for axis in AXES[1:]}
    rows: list[dict[str, float | None]] = [{"step": 0.0, **dict.fromkeys(AXES[1:], 0.0)}]
    for index, record in enumerate(history.steps):
        rows.append({"step": float(record["step"]), **{axis: points[index][1] for axis, points in columns.items()}})
    if (end := number(history.summary.get("step"))) is not None:
        rows.append({"step": end, **{axis: number(history.summary.get(axis)) for axis in AXES[1:]}})
    stride = max(1, -(-len(rows) // KNOTS))
    rows = [*rows[:-1:stride], rows[-1]]
    axes = {"step": _increasing(row["step"] for row in rows)}
    for axis in AXES[1:]:
        values = [row[axis] for row in rows]
        if all(value is not None for value in values):
            axes[axis] = _increasing(values)
    return Timeline(name=name, axes=axes, marks=marks(history))


def marks(history: History) -> list[Mark]:
    """Vertical marks for growth, freeze, base removal and resumes."""
    found = []
    for change in history.rank_changes:
        label, colour, dash = MARK_STYLE.get(change.action, ("rank event", "--c7", ""))
        tip = f"step {change.step:,}: {label}, {change.changed:,} of {plural(change.total, 'layer')}"
        found.append(Mark(x=change.step, label=label, colour=colour, dash=dash, tooltip=tip))
    for record in history.base_removals:
        tip = f"step {record['step']:,}: base removed"
        found.append(Mark(x=record["step"], label="base removed", colour="--c3", dash="7 3", tooltip=tip))
    for record in history.resumes:
        tip = f"step {record['step']:,}: resumed"
        found.append(Mark(x=record["step"], label="resume", colour="--c4", dash="1 3", tooltip=tip))
    return found


def _increasing(values: Iterable[float | None]) -> list[float]:
    """The values, each at least as large as the one before."""
    result: list[float] = []
    for value in values:
        result.append(max(value or 0.0, result[-1] if result else 0.0))
    return result
