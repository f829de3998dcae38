"""Singular values of a chosen layer, at a chosen step and over training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from ..train.monitors.text import number
from .chart import COLOURS, Charts, digits, frame, key
from .history import History

MOST_NUMBERS = 300_000
"""Maximum number of singular values in a page, about; above it, decisions are left out, evenly."""

OVER_TIME = (1, 2, 4, 8, 16, 32, 64, 128)
"""Indices of the singular values that are drawn over training, if they were recorded."""

NOW, FIRST, NULL, RANK, NULL_RANK = "at this step", "at first", "null spectrum", "rank", "null rank"


def spectra_of_decisions(charts: Charts, history: History, run: int = 0) -> str:
    """The spectra that the rule chose ranks from, with the null spectra at the same Frobenius norm."""
    records = {step: record.get("layers") or {} for step, record in sorted(history.spectra.items())}
    panel = _Panel(records)
    for step in panel.steps:
        for entry in history.spectra[step].get("null_spectra") or ():
            shape = tuple(entry.get("shape") or ())
            panel.nulls.setdefault(_shape_key(shape), {})[panel.steps.index(step)] = panel.spectrum(entry)
    return panel.html(charts, run, "singular values of what the rule measures", [NULL, RANK, NULL_RANK])


def spectra_of_dense(
    charts: Charts, records: Mapping[int, Mapping[str, dict[str, Any]]], what: str, run: int = 0
) -> str:
    """The spectra of dense layers, or of their updates.

    Args:
        records: step -> layer -> entry with ``sigma`` and ``indices``.
        what: the matrix that was measured, such as ``W(t)``.
    """
    return _Panel(dict(sorted(records.items()))).html(charts, run, f"singular values of {what}", [])


class _Panel:
    """Collects spectra by layer and step.

    Args:
        records: step -> layer -> entry with ``sigma`` and ``indices``, in the order of steps.
    """

    def __init__(self, records: Mapping[int, Mapping[str, dict[str, Any]]]) -> None:
        numbers = sum(len(entry.get("sigma") or ()) for layers in records.values() for entry in layers.values())
        self.steps = _evenly(list(records), max(2, int(len(records) * MOST_NUMBERS / max(numbers, 1))))
        self.nulls: dict[str, dict[int, list[Any]]] = {}
        self._indices: dict[tuple[int, ...], int] = {}
        self._layers: dict[str, dict[str, Any]] = {}
        for at, step in enumerate(self.steps):
            for name, entry in records[step].items():
                if not entry.get("sigma"):
                    continue
                shape = _shape_key(entry.get("shape") or ())
                layer = self._layers.setdefault(name, {"name": name, "shape": shape, "at": []})
                facts = [digits(number(entry.get(fact))) for fact in ("rank", "null_rank", "norm")]
                layer["at"].append([at, *self.spectrum(entry), *facts])

    def spectrum(self, entry: dict[str, Any]) -> list[Any]:
        """The number of the list of indices, and the singular values."""
        sigma = entry.get("sigma") or []
        indices = tuple(entry.get("indices") or range(1, len(sigma) + 1))
        return [self._indices.setdefault(indices, len(self._indices)), [digits(number(each), 4) for each in sigma]]

    def _has_curve(self, index: int) -> bool:
        """Whether a singular value was recorded at two steps of a layer, or at the only step of all."""
        lists, least = list(self._indices), min(2, len(self.steps))
        layers = self._layers.values()
        return any(sum(index in lists[known] for _, known, *_ in layer["at"]) >= least for layer in layers)

    def html(self, charts: Charts, run: int, unit: str, more: list[str]) -> str:
        """The panel as HTML; empty if there are no spectra."""
        if not self._layers:
            return ""
        drawn = [index for index in OVER_TIME if self._has_curve(index)]
        colours = {_ordinal(index): COLOURS[at % len(COLOURS)] for at, index in enumerate(drawn)}
        index = charts.add(
            "spectra",
            {
                "run": run,
                "steps": self.steps,
                "indices": [list(indices) for indices in self._indices],
                "layers": list(self._layers.values()),
                "nulls": self.nulls,
                "drawn": [
                    [index, label, colour] for index, (label, colour) in zip(drawn, colours.items(), strict=True)
                ],
            },
        )
        styles = {NULL: ("--ink", "6 4", False), RANK: ("--c2", "", True), NULL_RANK: ("--ink", "2 3", True)}
        entries = [key(NOW, "--c0"), key(FIRST, "--c0", faint=True)]
        for label in more:
            colour, dash, upright = styles[label]
            entries.append(key(label, colour, dash, upright=upright))
        options = "".join(
            f'<option value="{at}">{escape(_short(name))}</option>' for at, name in enumerate(self._layers)
        )
        over_time = [key(label, colour) for label, colour in colours.items()]
        last = len(self.steps) - 1
        return (
            f'<div class="spectra" data-spectra="{index}"><div class="picker"><label>Layer <select>{options}</select>'
            f'</label><label>Step <input type="range" min="0" max="{last}" value="{last}"> <output></output></label>'
            f'</div><div class="pair">{frame("Spectrum", unit, entries, "data-part=now", 260)}'
            f"{frame('Over training', 'singular values', over_time, 'data-part=time', 260)}</div></div>"
        )


def _evenly(steps: list[int], most: int) -> list[int]:
    """At most ``most`` of the steps, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(index * (len(steps) - 1) / (most - 1))] for index in range(most)]


def _shape_key(shape: Iterable[Any]) -> str:
    return "x".join(str(size) for size in sorted(shape))


def _ordinal(index: int) -> str:
    return f"{index}{'st' if index % 10 == 1 and index != 11 else 'nd' if index % 10 == 2 and index != 12 else 'th'}"


def _short(name: str) -> str:
    """A name that a list of choices can show."""
    return name if len(name) <= 80 else f"{name[:40]}…{name[-39:]}"
