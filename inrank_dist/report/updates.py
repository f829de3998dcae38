"""Plots of the cumulative updates of dense layers."""

from __future__ import annotations

from typing import Any

from ..train.monitors.ranks import mean
from ..train.monitors.text import fixed, number, plural
from .history import History, Points
from .plot import Line, Mark, Plot, figure
from .style import text_table
from .timeline import marks

HALF = 490

#: Singular values to draw, if they were recorded.
DRAWN = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
COLOURS = ("--c0", "--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7")


def update_figures(history: History) -> str:
    """Effective and stable rank of ``W(t) - W(0)`` beside those of noise, a table, and the spectrum of every layer."""
    records = sorted(history.updates.items())
    if not records:
        return ""
    events = marks(history)
    ranks = "".join(
        figure(
            Plot(
                title=f"{title} of the cumulative updates",
                unit=f"{meaning}, mean over dense layers",
                lines=[
                    Line(label=title.lower(), points=_means(records, key), colour="--c0", width=2, dots=True),
                    Line(
                        label="of a Gaussian matrix",
                        points=_means(records, f"null_{key}"),
                        colour="--ink",
                        dash="6 4",
                    ),
                ],
                marks=events,
                x_end=history.last_step,
                from_zero=True,
            ),
            height=220,
            wide=HALF,
        )
        for title, key, meaning in (
            ("Effective rank", "effective_rank", "nuclear over spectral norm"),
            ("Stable rank", "stable_rank", "squared Frobenius over squared spectral norm"),
        )
    )
    layers = dict.fromkeys(name for _, each in records for name in each)
    spectra = "".join(_spectrum(name, records, events, history.last_step) for name in layers)
    return (
        f"<h2>Cumulative updates</h2><p>W(t) - W(0) of {plural(len(layers), 'dense layer')}.</p>"
        f'<div class="pair">{ranks}</div>{_table(records)}<details><summary>Singular values of every layer over time'
        f'</summary><div class="pair">{spectra}</div></details>'
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


def _spectrum(name: str, records: list[tuple[int, dict[str, Any]]], events: list[Mark], x_end: int) -> str:
    lines: dict[int, Points] = {}
    for step, layers in records:
        layer = layers.get(name) or {}
        for index, sigma in zip(layer.get("indices") or (), layer.get("sigma") or (), strict=False):
            if index in DRAWN:
                lines.setdefault(index, []).append((step, number(sigma)))
    drawn = [
        Line(label=f"singular value {index}", points=points, colour=COLOURS[place % len(COLOURS)])
        for place, (index, points) in enumerate(sorted(lines.items()))
    ]
    plot = Plot(title=name, unit="singular values", lines=drawn, marks=events, x_end=x_end, from_zero=True)
    return figure(plot, height=220, wide=HALF)
