"""Effective and stable ranks of the weights of dense layers."""

from __future__ import annotations

from typing import Any

from ..train.monitors.ranks import mean
from ..train.monitors.text import fixed, number, plural
from .chart import Chart, Charts, Line
from .history import History, Points
from .spectra import spectra_of_dense
from .style import text_table


def weight_figures(charts: Charts, history: History) -> str:
    """Ranks of ``W(t)`` beside those of noise, and the scaled stable ranks that decide when layers are factored."""
    plots, tables = [], []
    if records := sorted(history.weights.items()):
        for title, key, meaning in (
            ("Effective rank", "effective_rank", "nuclear over spectral norm"),
            ("Stable rank", "stable_rank", "squared Frobenius over squared spectral norm"),
        ):
            lines = [
                Line(label=title.lower(), points=_means(records, key), width=2, dots=True),
                Line(label="of a Gaussian matrix", points=_means(records, f"null_{key}"), colour="--ink", dash="6 4"),
            ]
            plots.append(_plot(charts, f"{title} of the weights", f"{meaning}, mean over dense layers", lines))
        tables.append(_table(records))
    if stable := sorted(history.stable_ranks.items()):
        line = Line(label="mean", points=_means(stable, "scaled_stable_rank"), width=2, dots=True)
        plots.append(_plot(charts, "Scaled stable rank", "full rank at initialisation, mean over layers", [line]))
        settled: Points = [
            (step, float(sum(each.get("settled") is True for each in layers.values()))) for step, layers in stable
        ]
        line = Line(label="settled", points=settled, width=2, dots=True)
        plots.append(_plot(charts, "Settled layers", "of those that are followed while dense", [line]))
    if not plots:
        return ""
    count = len({name for _, layers in records or stable for name in layers})
    return (
        f"<h2>Weights of dense layers</h2><p>W(t) of {plural(count, 'dense layer')}.</p>"
        f'{charts.controls()}<div class="pair">{"".join(plots)}</div>'
        f"{spectra_of_dense(charts, history.weights, 'W(t)')}{''.join(tables)}"
    )


def _plot(charts: Charts, title: str, unit: str, lines: list[Line]) -> str:
    return charts.figure(Chart(title=title, unit=unit, lines=lines, from_zero=True))


def _means(records: list[tuple[int, dict[str, Any]]], key: str) -> Points:
    return [(step, mean(number(layer.get(key)) for layer in layers.values())) for step, layers in records]


def _table(records: list[tuple[int, dict[str, Any]]]) -> str:
    """The last measurement of every layer."""
    newest = {name: layer for _, layers in records for name, layer in layers.items()}
    rows = [
        [
            name,
            *(
                f"{fixed(layer.get(key), 1)} ({fixed(layer.get(f'null_{key}'), 1)})"
                for key in ("effective_rank", "stable_rank")
            ),
        ]
        for name, layer in newest.items()
    ]
    return text_table(["layer", "effective rank (of noise)", "stable rank (of noise)"], rows, {0})
