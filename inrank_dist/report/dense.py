"""Plots of the weights of dense layers and of their cumulative updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runtime.words import plural
from ..train.monitors.ranks import mean
from ..train.monitors.text import fixed, number
from .chart import Chart, Charts, Line
from .history import History, Points
from .spectra import spectra_of_dense
from .style import text_table

RANKS = (
    ("Effective rank", "effective_rank", "nuclear over spectral norm"),
    ("Stable rank", "stable_rank", "squared Frobenius over squared spectral norm"),
)

Measurements = Mapping[int, Mapping[str, dict[str, Any]]]
"""Step -> layer -> what was measured."""


def update_figures(charts: Charts, history: History) -> str:
    """Effective and stable rank of ``W(t) - W(0)`` beside those of noise, a table, and the spectrum of every layer."""
    updates = history.updates
    plots = _rank_plots(charts, updates, "the cumulative updates")
    return _section(charts, "Cumulative updates", "W(t) - W(0)", updates, plots, updates)


def weight_figures(charts: Charts, history: History) -> str:
    """The same of ``W(t)``, and the scaled stable ranks that decide when layers are factored."""
    weights, stable = history.weights, history.stable_ranks
    plots = _rank_plots(charts, weights, "the weights")
    if stable:
        line = Line(label="mean", points=_means(stable, "scaled_stable_rank"), width=2, dots=True)
        plots.append(_plot(charts, "Scaled stable rank", "full rank at initialisation, mean over layers", [line]))
        settled: Points = [
            (step, float(sum(each.get("settled") is True for each in stable[step].values()))) for step in sorted(stable)
        ]
        line = Line(label="settled", points=settled, width=2, dots=True)
        plots.append(_plot(charts, "Settled layers", "of those that are followed while dense", [line]))
    return _section(charts, "Weights of dense layers", "W(t)", weights or stable, plots, weights)


def _section(
    charts: Charts, title: str, matrix: str, layers: Measurements, plots: list[str], spectra: Measurements
) -> str:
    """A section of a page; empty without plots.

    Args:
        layers: measurements that name all layers.
        spectra: measurements with singular values.
    """
    if not plots:
        return ""
    count = len({name for each in layers.values() for name in each})
    return (
        f"<h2>{title}</h2><p>{matrix} of {plural(count, 'dense layer')}.</p>"
        f'{charts.controls()}<div class="pair">{"".join(plots)}</div>'
        f"{spectra_of_dense(charts, spectra, matrix)}{_table(spectra)}"
    )


def _rank_plots(charts: Charts, measured: Measurements, what: str) -> list[str]:
    """The mean effective and stable rank beside those of a Gaussian matrix."""
    plots = []
    for title, key, meaning in RANKS if measured else ():
        lines = [
            Line(label=title.lower(), points=_means(measured, key), width=2, dots=True),
            Line(label="of a Gaussian matrix", points=_means(measured, f"null_{key}"), colour="--ink", dash="6 4"),
        ]
        plots.append(_plot(charts, f"{title} of {what}", f"{meaning}, mean over dense layers", lines))
    return plots


def _plot(charts: Charts, title: str, unit: str, lines: list[Line]) -> str:
    return charts.figure(Chart(title=title, unit=unit, lines=lines, from_zero=True))


def _means(measured: Measurements, key: str) -> Points:
    return [(step, mean(number(layer.get(key)) for layer in measured[step].values())) for step in sorted(measured)]


def _table(measured: Measurements) -> str:
    """The last measurement of every layer; empty if there is none."""
    newest = {name: layer for step in sorted(measured) for name, layer in measured[step].items()}
    if not newest:
        return ""
    rows = [
        [
            name,
            " x ".join(str(size) for size in layer.get("shape") or ()),
            *(f"{fixed(layer.get(key), 1)} ({fixed(layer.get(f'null_{key}'), 1)})" for _, key, _ in RANKS),
        ]
        for name, layer in newest.items()
    ]
    return text_table(["layer", "shape", "effective rank (of noise)", "stable rank (of noise)"], rows, {0, 1})
