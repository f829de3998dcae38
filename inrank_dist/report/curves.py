"""The plots of a run: which curves to draw, and against which references."""

from __future__ import annotations

from typing import Any

from ..train.monitors.text import fixed, number, plural
from .heatmap import HeatMap
from .history import History
from .plot import Line, Mark, Plot, Reference, figure, smoothed

WIDE, HALF, NARROW = 1020, 490, 350
MARK_STYLE = {"grow": ("growth", "--c2", "2 3"), "freeze": ("freeze", "--c0", "")}


def loss_figure(history: History) -> str:
    """Training and validation loss against the unigram entropy, with the run's events."""
    train = history.curve("loss")
    if len(train) >= 50:
        lines = [
            Line(label="train, as logged", points=train, colour="--c0", width=1, opacity=0.3, scales=False),
            Line(label="train, smoothed", points=smoothed(train, len(train) // 100), colour="--c0"),
        ]
    else:
        lines = [Line(label="train", points=train, colour="--c0")]
    validation = history.eval_curve("loss")
    lines.append(Line(label="validation", points=validation, colour="--c1", width=2, dots=True))
    entropy = history.unigram_entropy
    return figure(
        Plot(
            title="Loss",
            unit="nats per token",
            lines=lines,
            marks=marks(history),
            references=[Reference(y=entropy, label=f"unigram entropy {entropy:.3f}")] if entropy else [],
            x_end=history.last_step,
        ),
        height=360,
        wide=WIDE,
    )


def dynamics_figures(history: History) -> str:
    """Small plots of the learning rate, gradient norm, throughput and number of parameters."""
    dense = number(history.summary.get("parameters_dense"))
    references = [Reference(y=dense, label="dense")] if dense and history.table.ranks else []
    plots = [
        Plot(
            title="Learning rate",
            lines=[Line(label="learning rate", points=history.curve("lr"), colour="--c0")],
            x_end=history.last_step,
            from_zero=True,
        ),
        Plot(
            title="Gradient norm",
            unit="before clipping",
            lines=[Line(label="gradient norm", points=history.curve("grad_norm"), colour="--c0", width=1.1)],
            x_end=history.last_step,
            log=True,
        ),
        Plot(
            title="Throughput",
            unit="tokens per second",
            lines=[Line(label="tokens per second", points=history.curve("tokens_per_s"), colour="--c0", width=1.1)],
            x_end=history.last_step,
            from_zero=True,
        ),
        Plot(
            title="Parameters",
            lines=[Line(label="parameters", points=history.curve("parameters"), colour="--c0", width=2, steps=True)],
            references=references,
            x_end=history.last_step,
            from_zero=True,
        ),
    ]
    figures = "".join(figure(plot, height=220, wide=HALF) for plot in plots)
    return f'<div class="pair">{figures}</div>' if figures else ""


def rank_figures(history: History, threshold: float | None) -> str:
    """The rank of every layer, the mean rank with the mean null rank, the explained ratio and the effective rank."""
    if not history.layers:
        return ""
    table, means = history.table, history.means
    notes = {
        name: " ".join([f"{fixed(rank, 0)} ({fixed(table.null_ranks.get(name), 0)})", *table.flags(name)])
        for name, rank in table.ranks.items()
    }
    turns = [mark for mark in marks(history) if mark.label != "growth"]
    ranks = HeatMap(
        layers=list(history.layers.values()),
        notes=notes,
        start_rank=history.start_rank,
        marks=turns,
        x_end=history.last_step,
    )
    null = means["null_rank"]
    mean_rank = Plot(
        title="Mean rank",
        unit="over all layers" + ("" if null else "; no null rank was measured"),
        lines=[
            Line(label="mean rank", points=means["rank"], colour="--c0", width=2, steps=True),
            Line(label="mean null rank", points=null, colour="--ink", width=1.6, dash="6 4", steps=True),
        ],
        marks=turns,
        x_end=history.last_step,
        from_zero=True,
    )
    threshold = table.threshold or threshold
    last_check = max((points[-1][0] for points in (means["explained"], means["effective_rank"]) if points), default=0.0)
    explained = Plot(
        title="Explained ratio",
        unit="by the rank after each check, mean over layers",
        lines=[_checked("explained", history)],
        references=[Reference(y=threshold, label=f"threshold {threshold:g}")] if threshold else [],
        x_end=last_check,
    )
    effective = Plot(
        title="Effective rank",
        unit="nuclear over spectral norm, mean over layers",
        lines=[_checked("effective_rank", history)],
        x_end=last_check,
        from_zero=True,
    )
    small = "".join(figure(plot, height=220, wide=HALF) for plot in (mean_rank, explained, effective))
    return f'<h2>Rank</h2>{ranks.figure(WIDE, NARROW)}<div class="pair">{small}</div>'


def threshold_of(settings: dict[str, Any]) -> float | None:
    """``lowrank.threshold`` of the resolved config, or None."""
    section = settings.get("lowrank")
    return number(section.get("threshold")) if isinstance(section, dict) else None


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


def _checked(key: str, history: History) -> Line:
    return Line(label=key.replace("_", " "), points=history.means[key], colour="--c0", width=1.8, dots=True)
