"""Plots of the cumulative updates of dense layers."""

from __future__ import annotations

from typing import Any

from ..train.monitors.ranks import mean
from ..train.monitors.text import fixed, plural
from .chart import Chart, Charts, Line
from .history import History, Points
from .spectra import spectra_of_dense
from .style import text_table

RANKS = (
    ("Effective rank", "effective_rank", "nuclear over spectral norm"),
    ("Stable rank", "stable_rank", "squared Frobenius over squared spectral norm"),
)


def update_figures(charts: Charts, history: History) -> str:
    """Effective and stable rank of ``W(t) - W(0)`` beside those of noise, a table, and the spectrum of every layer."""
    records = sorted(history.updates.items())
    if not records:
        return ""
    ranks = "".join(
        charts.figure(
            Chart(
                title=f"{title} of the cumulative updates",
                unit=f"{meaning}, mean over dense layers",
                lines=[
                    Line(label=title.lower(), points=_means(records, key), width=2, dots=True),
                    Line(
                        label="of a Gaussian matrix",
                        points=_means(records, f"null_{key}"),
                        colour="--ink",
                        dash="6 4",
                    ),
                ],
                from_zero=True,
            )
        )
        for title, key, meaning in RANKS
    )
    layers = dict.fromkeys(name for _, each in records for name in each)
    spectra = spectra_of_dense(charts, history.updates, "W(t) - W(0)")
    return (
        f"<h2>Cumulative updates</h2><p>W(t) - W(0) of {plural(len(layers), 'dense layer')}.</p>"
        f'{charts.controls()}<div class="pair">{ranks}</div>{spectra}{_table(records)}'
    )


def _means(records: list[tuple[int, dict[str, Any]]], key: str) -> Points:
    return [(step, mean(layer.get(key) for layer in layers.values())) for step, layers in records]


def _table(records: list[tuple[int, dict[str, Any]]]) -> str:
    """The last measurement of every layer."""
    newest = {name: layer for _, layers in records for name, layer in layers.items()}
    rows = [
        [
            name,
            " x ".join(str(size) for size in layer.get("shape") or ()),
            *(
                f"{fixed(layer.get(key), 1)} ({fixed(layer.get(f'null_{key}'), 1)})"
                for key in ("effective_rank", "stable_rank")
            ),
        ]
        for name, layer in newest.items()
    ]
    return text_table(["layer", "shape", "effective rank (of noise)", "stable rank (of noise)"], rows, {0, 1})
