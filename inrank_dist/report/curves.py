"""The plots of a run: which curves to draw, and against which references."""

from __future__ import annotations

from typing import Any

from ..train.monitors.text import number
from .chart import Chart, Charts, Line
from .heatmap import heat_maps
from .history import History, Points
from .plot import Reference, smoothed
from .run import value_of
from .spectra import spectra_of_decisions

MEMORY = (("peak_memory", "peak on the GPU of process 0"), ("resident_memory", "resident set of process 0"))


def loss_lines(points: Points, label: str = "train", colour: str = "--c0", run: int = 0) -> list[Line]:
    """The training loss: smoothed and, in the background, as logged, if it is long enough."""
    if len(points) < 50:
        return [Line(label=label, points=points, colour=colour, run=run)]
    smooth = smoothed(points, len(points) // 100)
    return [
        Line(label=f"{label}, as logged", points=points, colour=colour, run=run, faint=True),
        Line(label=f"{label}, smoothed", points=smooth, colour=colour, run=run),
    ]


def loss_figure(charts: Charts, history: History) -> str:
    """Training and validation loss against the unigram entropy, with the run's events."""
    validation = Line(label="validation", points=history.eval_curve("loss"), colour="--c1", width=2, dots=True)
    entropy = history.unigram_entropy
    return charts.figure(
        Chart(
            title="Loss",
            unit="nats per token",
            lines=[*loss_lines(history.curve("loss")), validation],
            references=[Reference(y=entropy, label=f"unigram entropy {entropy:.3f}")] if entropy else [],
            height=360,
        )
    )


def dynamics_figures(charts: Charts, history: History) -> str:
    """Small plots of bits per byte, learning rate, gradient norm, throughput, memory and the number of parameters."""
    dense = number(history.summary.get("parameters_dense"))
    references = [Reference(y=dense, label="dense")] if dense and history.table.ranks else []

    def line(label: str, key: str, width: float = 1.2) -> Line:
        return Line(label=label, points=history.curve(key), width=width)

    bits = Line(label="validation", points=history.eval_curve("bits_per_byte"), colour="--c1", width=2, dots=True)
    memory, unit = memory_lines(history)
    parameters = Line(label="parameters", points=history.curve("parameters"), width=2, hold=True)
    plots = [
        Chart(title="Bits per byte", unit="validation", lines=[bits]),
        Chart(title="Learning rate", lines=[line("learning rate", "lr", 1.6)], from_zero=True),
        Chart(title="Gradient norm", unit="before clipping", lines=[line("gradient norm", "grad_norm")], log=True),
        Chart(
            title="Throughput",
            unit="tokens per second",
            lines=[line("tokens per second", "tokens_per_s")],
            from_zero=True,
        ),
        Chart(title="Memory", unit=unit, lines=memory, from_zero=True),
        Chart(title="Parameters", lines=[parameters], references=references, from_zero=True),
    ]
    figures = "".join(charts.figure(plot) for plot in plots)
    return f'<div class="pair">{figures}</div>' if figures else ""


def memory_points(history: History) -> tuple[Points, str]:
    """The memory of process 0 over the steps in bytes, and what was measured; empty if nothing was."""
    for key, what in MEMORY:
        points = history.curve(key)
        if any(value for _, value in points):
            return points, what
    return [], ""


def memory_lines(history: History, run: int = 0) -> tuple[list[Line], str]:
    """The memory of process 0 over the steps, and the unit."""
    points, what = memory_points(history)
    if not points:
        return [], ""
    most = max(value for _, value in points if value is not None)
    unit, name = (2**30, "GiB") if most >= 2**30 else (2**20, "MiB")
    return [Line(label=what, points=scaled(points, unit), run=run, width=1.2)], f"{name}, {what}"


def scaled(points: Points, unit: float) -> Points:
    """Points with their values in multiples of a unit."""
    return [(step, None if value is None else value / unit) for step, value in points]


def rank_figures(charts: Charts, history: History, threshold: float | None) -> str:
    """The rank of every layer, the mean rank with the mean null rank, the explained ratio and the effective rank."""
    if not history.layers:
        return ""
    table, means = history.table, history.means
    null = means["null_rank"]
    mean_rank = Chart(
        title="Mean rank",
        unit="over all layers" + ("" if null else "; no null rank was measured"),
        lines=[
            Line(label="mean rank", points=means["rank"], width=2, hold=True),
            Line(label="mean null rank", points=null, colour="--ink", dash="6 4", hold=True),
        ],
        from_zero=True,
    )
    threshold = table.threshold or threshold
    explained = Chart(
        title="Explained ratio",
        unit="by the rank after each check, mean over layers",
        lines=[_checked("explained", history)],
        references=[Reference(y=threshold, label=f"threshold {threshold:g}")] if threshold else [],
    )
    effective = Chart(
        title="Effective rank",
        unit="nuclear over spectral norm, mean over layers",
        lines=[_checked("effective_rank", history)],
        from_zero=True,
    )
    small = "".join(charts.figure(plot) for plot in (mean_rank, explained, effective))
    maps, spectra = heat_maps(charts, history), spectra_of_decisions(charts, history)
    return f'<h2>Rank</h2>{charts.controls()}<div class="pair">{maps}</div>{spectra}<div class="pair">{small}</div>'


def threshold_of(settings: dict[str, Any]) -> float | None:
    """``lowrank.threshold`` of the resolved config, or None."""
    return number(value_of(settings, "lowrank", "threshold"))


def _checked(key: str, history: History) -> Line:
    return Line(label=key.replace("_", " "), points=history.means[key], width=1.8, dots=True)
