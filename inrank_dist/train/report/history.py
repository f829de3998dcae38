"""A run's records sorted by what they tell, ready to be drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from statistics import fmean, median
from typing import Any

from inrank_dist.train.monitors.ranks import RankTable, mean
from inrank_dist.train.monitors.text import number

Points = list[tuple[float, float | None]]


@dataclass(kw_only=True)
class Layer:
    """One low-rank layer: what is known of it at the end, and how it got there."""

    name: str
    shape: tuple[int, int] | None = None
    rank: Points = field(default_factory=list)
    null_rank: Points = field(default_factory=list)
    explained: Points = field(default_factory=list)
    effective_rank: Points = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The last two parts of the name that are not numbers: ``blocks.3.mlp.up`` -> ``mlp.up``."""
        return ".".join([part for part in self.name.split(".") if not part.isdigit()][-2:])

    @property
    def factor_parameters(self) -> int | None:
        """``r * (out + in)`` at the present rank."""
        rank = last(self.rank)
        return None if self.shape is None or rank is None else round(rank * sum(self.shape))

    @property
    def dense_parameters(self) -> int | None:
        """``out * in``."""
        return None if self.shape is None else self.shape[0] * self.shape[1]


class History:
    """The records of one run by kind; where a step was logged twice the later record counts.

    ``summary`` is empty unless the run ended after its last logged step. ``layers`` maps names to ``Layer``
    in the order the run named them.
    """

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.start: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.resumes: list[dict[str, Any]] = []
        self.rank_events: list[dict[str, Any]] = []
        self.base_removals: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self._decision_seconds: dict[int, float] = {}
        self.layers: dict[str, Layer] = {}
        self.table = RankTable()
        steps: dict[int, dict[str, Any]] = {}
        evals: dict[int, dict[str, Any]] = {}
        for record in records:
            kind, step = record.get("kind"), record.get("step")
            # The curve of a layer is told by its events; a later process only repeats where it took over.
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
        self.steps = [steps[step] for step in sorted(steps)]
        self.evals = [evals[step] for step in sorted(evals)]

    def _start(self, record: dict[str, Any]) -> None:
        if not self.start:
            self.start = record
            for name, rank in (record.get("ranks") or {}).items():
                self._layer(name).rank.append((0, number(rank)))

    def _end(self, record: dict[str, Any]) -> None:
        self.summary = record
        for name, entry in (record.get("ranks") or {}).items():
            layer = self._layer(name)
            shape = entry.get("shape")
            layer.shape = (int(shape[0]), int(shape[1])) if shape else None
            step = number(record.get("step")) or 0.0
            for points, key in ((layer.rank, "rank"), (layer.null_rank, "null_rank")):
                if (value := number(entry.get(key))) is not None and (not points or points[-1][0] <= step):
                    _put(points, step, value)

    def _ranks(self, record: dict[str, Any], step: int) -> None:
        if record["kind"] == "rank_event":
            self.rank_events.append(record)
        seconds = number(record.get("seconds")) or 0.0
        self._decision_seconds[step] = max(seconds, self._decision_seconds.get(step, 0.0))
        for name in record.get("layers") or {}:
            layer = self._layer(name)
            _put(layer.rank, step, self.table.ranks.get(name))
            _put(layer.null_rank, step, self.table.null_ranks.get(name))
            _put(layer.explained, step, self.table.explained.get(name))
            _put(layer.effective_rank, step, self.table.effective_ranks.get(name))

    def _layer(self, name: str) -> Layer:
        return self.layers.setdefault(name, Layer(name=name))

    def curve(self, key: str) -> Points:
        """``key`` of every logged step; None where it is missing or not finite."""
        return [(record["step"], number(record.get(key))) for record in self.steps]

    def eval_curve(self, key: str) -> Points:
        """``key`` of every evaluation; None where it is missing or not finite."""
        return [(record["step"], number(record.get(key))) for record in self.evals]

    def mean_over_layers(self, key: str) -> Points:
        """Mean over layers of one of ``Layer``'s curves, each layer holding its value until its next one."""
        changes = [
            (step, index, value)
            for index, layer in enumerate(self.layers.values())
            for step, value in getattr(layer, key)
        ]
        changes.sort(key=itemgetter(0))
        held: list[float | None] = [None] * len(self.layers)
        points: Points = []
        for step, at_step in groupby(changes, key=itemgetter(0)):
            for _, index, value in at_step:
                held[index] = value
            points.append((step, mean(held)))
        return points

    def first(self, key: str) -> Any:
        """``key`` from the summary, or else from the start of the run, or None."""
        return self.summary.get(key, self.start.get(key))

    @property
    def last_step(self) -> int:
        """The last step the records speak of; 0 if none."""
        ends = [record["step"] for record in (*self.steps[-1:], *self.evals[-1:])]
        return int(max([*ends, number(self.summary.get("step")) or 0]))

    @property
    def ended(self) -> bool:
        """True if a summary closes the records."""
        return bool(self.summary)

    @property
    def decision_seconds(self) -> float:
        """Time spent on decisions on rank; a check and an event of one step are one decision."""
        return sum(self._decision_seconds.values())

    @property
    def unigram_entropy(self) -> float | None:
        """Entropy of the validation tokens' frequencies, in nats per token."""
        return number(self.first("unigram_entropy"))

    @property
    def validation_loss(self) -> float | None:
        """The last validation loss, in nats per token."""
        value = number(self.summary.get("validation_loss"))
        return value if value is not None else last(self.eval_curve("loss"))

    @property
    def perplexity(self) -> float | None:
        """The last validation perplexity."""
        value = number(self.summary.get("perplexity"))
        return value if value is not None else last(self.eval_curve("perplexity"))

    @property
    def train_loss(self) -> float | None:
        """The summary's training loss, or the mean over the last tenth of the logged steps."""
        value = number(self.summary.get("train_loss"))
        recent = [loss for _, loss in self.curve("loss")[-max(1, len(self.steps) // 10) :] if loss is not None]
        return value if value is not None else (fmean(recent) if recent else None)

    @property
    def parameters(self) -> float | None:
        """Parameters at the end of the records."""
        value = number(self.summary.get("parameters"))
        return value if value is not None else last(self.curve("parameters"))

    @property
    def parameters_start(self) -> float | None:
        """Parameters before the first step."""
        return number(self.summary.get("parameters_start", self.start.get("parameters")))

    @property
    def tokens(self) -> float | None:
        """Tokens trained on in all."""
        value = number(self.summary.get("tokens"))
        return value if value is not None else last(self.curve("tokens"))

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the logged steps."""
        speeds = [speed for _, speed in self.curve("tokens_per_s") if speed]
        return median(speeds) if speeds else None


def last(points: Points) -> float | None:
    """The last value that is not None."""
    return next((value for _, value in reversed(points) if value is not None), None)


def _put(points: Points, step: float, value: float | None) -> None:
    """Append, or replace what the same step said before."""
    if points and points[-1][0] == step:
        points.pop()
    points.append((step, value))
