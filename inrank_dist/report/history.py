"""The records of a run, organized for plotting."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from ..train.monitors.ranks import RankChange, RankTable, mean
from ..train.monitors.text import number

Points = list[tuple[float, float | None]]


@dataclass(kw_only=True)
class Layer:
    """One low-rank layer: its shape ``(out, in)`` and its history.

    ``rank`` holds the steps at which the rank changed, with the new rank, from the start of the run. The others hold
    those at which a decision changed the rank found, the null rank, the explained ratio and the effective rank.
    """

    name: str
    shape: tuple[int, int] | None = None
    rank: Points = field(default_factory=list)
    found: Points = field(default_factory=list)
    null_rank: Points = field(default_factory=list)
    explained: Points = field(default_factory=list)
    effective_rank: Points = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The last two parts of the name that are not numbers: ``blocks.3.mlp.up`` -> ``mlp.up``."""
        return ".".join([part for part in self.name.split(".") if not part.isdigit()][-2:])

    @property
    def factor_parameters(self) -> int | None:
        """``r * (out + in)`` at the current rank."""
        rank = last(self.rank)
        return None if self.shape is None or rank is None else round(rank * sum(self.shape))

    @property
    def dense_parameters(self) -> int | None:
        """``out * in``."""
        return None if self.shape is None else self.shape[0] * self.shape[1]


class History:
    """The records of one run by kind. If a step was logged twice, the later record is used.

    ``summary`` is empty unless the run has finished after its last logged step. ``layers`` maps names to ``Layer`` in
    the order in which the run first named them. ``means`` holds the mean over all layers of the rank, null rank,
    explained ratio and effective rank at every check, with each layer keeping its value until its next check.
    ``updates``, ``weights`` and ``stable_ranks`` map steps to measurements of dense layers, by layer. ``spectra`` maps
    steps to the records of decisions with singular values. ``last_decision`` is the step of the last rank decision, or
    None.
    """

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self.start: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.resumes: list[dict[str, Any]] = []
        self.rank_changes: list[RankChange] = []
        self.base_removals: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.updates: dict[int, dict[str, dict[str, Any]]] = {}
        self.spectra: dict[int, dict[str, Any]] = {}
        self.weights: dict[int, dict[str, dict[str, Any]]] = {}
        self.stable_ranks: dict[int, dict[str, dict[str, Any]]] = {}
        self._decision_seconds: dict[int, float] = {}
        self.last_decision: int | None = None
        self.layers: dict[str, Layer] = {}
        self.table = RankTable()
        self.means: dict[str, Points] = {"rank": [], "null_rank": [], "explained": [], "effective_rank": []}
        self.count = 0
        steps: dict[int, dict[str, Any]] = {}
        evals: dict[int, dict[str, Any]] = {}
        for record in records:
            self.count += 1
            kind, step = record.get("kind"), record.get("step")
            # Events define the ranks over time; the start record of a resumed run only repeats the current ones.
            if kind != "start" or not self.start:
                self.table.update(record)
            if kind == "start":
                self._start(record)
            elif kind == "summary":
                self._end(record)
            elif not isinstance(step, int):
                continue
            elif kind == "step":
                steps[step] = record
                self.summary = {}
            elif kind == "eval":
                evals[step] = record
            elif kind in ("rank_event", "rank_check"):
                self._ranks(record, step)
            elif kind == "resume":
                self.resumes.append(record)
            elif kind == "base_removed":
                self.base_removals.append(record)
            elif kind == "sample":
                self.samples.append(record)
            elif kind == "updates":
                self.updates[step] = record.get("layers") or {}
            elif kind == "weights":
                self.weights[step] = record.get("layers") or {}
            elif kind == "stable_ranks":
                self.stable_ranks[step] = record.get("layers") or {}
        self.steps = [steps[step] for step in sorted(steps)]
        self.evals = [evals[step] for step in sorted(evals)]

    def _start(self, record: dict[str, Any]) -> None:
        if not self.start:
            self.start = record
            self._take_ranks(record.get("ranks") or {}, 0)

    def _end(self, record: dict[str, Any]) -> None:
        self.summary = record
        layers = record.get("ranks") or {}
        self._take_shapes(layers)
        self._take_ranks(layers, number(record.get("step")) or 0.0)

    def _ranks(self, record: dict[str, Any], step: int) -> None:
        layers = record.get("layers") or {}
        if record["kind"] == "rank_event":
            self.rank_changes.append(self.table.change(record))
        elif any("sigma" in layer for layer in layers.values()):
            self.spectra[step] = record
        self._take_shapes(layers)
        self.last_decision = max(step, self.last_decision or 0)
        seconds = number(record.get("seconds")) or 0.0
        self._decision_seconds[step] = max(seconds, self._decision_seconds.get(step, 0.0))
        self._take_ranks(layers, step, measured=True)

    def _take_shapes(self, layers: dict[str, dict[str, Any]]) -> None:
        for name, entry in layers.items():
            if shape := entry.get("shape"):
                self._layer(name).shape = (int(shape[0]), int(shape[1]))

    def _take_ranks(self, names: Iterable[str], step: float, *, measured: bool = False) -> None:
        """Append the table's current values for these layers; ``measured``: including values from their spectra."""
        table, ranks = self.table, self.table.ranks
        for name in names:
            points, rank = self._layer(name).rank, ranks.get(name)
            if not points or points[-1][1] != rank:
                _put(points, step, rank)
        tables: dict[str, dict[str, float]] = {"rank": ranks, "null_rank": table.null_ranks}
        if measured:
            tables |= {"explained": table.explained, "effective_rank": table.effective_ranks}
            for key, values in {**tables, "found": table.found}.items():
                for name in names:
                    points, value = getattr(self._layer(name), key), values.get(name)
                    if value is not None and (not points or points[-1][1] != value):
                        _put(points, step, value)
        for key, values in tables.items():
            if values:
                _put(self.means[key], step, mean(values.values()))

    def _layer(self, name: str) -> Layer:
        layer = self.layers.get(name)
        if layer is None:
            layer = self.layers[name] = Layer(name=name)
        return layer

    def curve(self, key: str) -> Points:
        """``key`` at every logged step; None where it is missing or not finite."""
        return [(record["step"], number(record.get(key))) for record in self.steps]

    def eval_curve(self, key: str) -> Points:
        """``key`` at every evaluation; None where it is missing or not finite."""
        return [(record["step"], number(record.get(key))) for record in self.evals]

    def at_end(self, key: str, points: Points | None = None) -> float | None:
        """``key`` at the end of the records: that of the summary, or else the last of ``points``, by default
        ``curve(key)``."""
        value = number(self.summary.get(key))
        return value if value is not None else last(self.curve(key) if points is None else points)

    def first(self, key: str) -> Any:
        """``key`` from the summary, or else from the start record, or None."""
        return self.summary.get(key, self.start.get(key))

    @property
    def last_step(self) -> int:
        """The last step in the records; 0 if there is none."""
        ends = [record["step"] for record in (*self.steps[-1:], *self.evals[-1:])]
        return int(max([*ends, number(self.summary.get("step")) or 0]))

    @property
    def goal(self) -> str:
        """Of how many steps the run is, as ``" of 400"``; empty if unknown."""
        planned = number(self.start.get("steps"))
        return f" of {planned:,.0f}" if planned else ""

    @property
    def start_rank(self) -> float | None:
        """The layers' initial rank; None if it was not recorded or differs between layers."""
        first = {number(rank) for rank in (self.start.get("ranks") or {}).values()}
        return self.table.initial_rank or (first.pop() if len(first) == 1 and not self.start.get("step") else None)

    @property
    def ended(self) -> bool:
        """Whether the records end with a summary."""
        return bool(self.summary)

    @property
    def decision_seconds(self) -> float:
        """Seconds spent on rank decisions. A check and an event at the same step are one decision."""
        return sum(self._decision_seconds.values())

    @property
    def unigram_entropy(self) -> float | None:
        """Entropy of the validation tokens' frequencies, in nats per token."""
        return number(self.first("unigram_entropy"))

    @property
    def validation_loss(self) -> float | None:
        """The last validation loss, in nats per token."""
        return self.at_end("validation_loss", self.eval_curve("loss"))

    @property
    def perplexity(self) -> float | None:
        """The last validation perplexity."""
        return self.at_end("perplexity", self.eval_curve("perplexity"))

    @property
    def bits_per_byte(self) -> float | None:
        """The last bits per byte of the validation; None if the bytes of its text are unknown."""
        return self.at_end("bits_per_byte", self.eval_curve("bits_per_byte"))

    @property
    def train_loss(self) -> float | None:
        """The summary's training loss, or the mean over the last tenth of the logged steps."""
        value = number(self.summary.get("train_loss"))
        recent = [loss for _, loss in self.curve("loss")[-max(1, len(self.steps) // 10) :] if loss is not None]
        return value if value is not None else (fmean(recent) if recent else None)

    @property
    def parameters(self) -> float | None:
        """Number of parameters at the end of the records."""
        return self.at_end("parameters")

    @property
    def parameters_start(self) -> float | None:
        """Number of parameters before the first step."""
        return number(self.summary.get("parameters_start", self.start.get("parameters")))

    @property
    def tokens(self) -> float | None:
        """Total number of training tokens."""
        return self.at_end("tokens")

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the logged steps."""
        speeds = [speed for _, speed in self.curve("tokens_per_s") if speed]
        return median(speeds) if speeds else None


def last(points: Points) -> float | None:
    """The last value that is not None."""
    return next((value for _, value in reversed(points) if value is not None), None)


def _put(points: Points, step: float, value: float | None) -> None:
    """Append a point, or replace the previous one if it is for the same step."""
    if points and points[-1][0] == step:
        points.pop()
    points.append((step, value))
