"""Results of a study: each variant compared with its control, seed by seed."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .settings import Point, Unit, Variant
from .work import Outcome, Run, Worker

T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantile of Student's t distribution, for 1 to 30 degrees of freedom."""


@dataclass(frozen=True)
class Difference:
    """Validation loss of a variant minus that of its control, paired by seed; nats.

    Attributes:
        values: one per seed.
        half: half the width of the 95 % confidence interval of the mean; nan for a single seed.
    """

    values: tuple[float, ...]
    half: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def verdict(self) -> str:
        """The result in words."""
        if not all(map(math.isfinite, self.values)):
            return "a run diverged"
        if math.isnan(self.half):
            return "one seed: no interval"
        if abs(self.mean) <= self.half:
            return "within the noise"
        return "below its control" if self.mean < 0 else "above its control"


@dataclass(frozen=True)
class Row:
    """Results of one variant, for an equal budget in one unit.

    Attributes:
        point: chosen from the variant's grid.
        edges: keys of ``point`` whose value is at an edge of the grid.
        losses: validation loss of each seed, nats.
        difference: from the control; None for a variant without one.
        used: unit -> median over the seeds.
        parameters, peak_memory: medians; memory in bytes of process 0.
        parameters_root: of the variant at the end of the chain of controls.
        rank, null_rank: means over layers and seeds; None for a dense model.
        same: whether these are the same runs as in the table of equal tokens.
    """

    variant: Variant
    unit: Unit
    point: Point
    edges: tuple[str, ...]
    losses: tuple[float, ...]
    difference: Difference | None
    steps: int
    used: dict[Unit, float]
    parameters: float
    parameters_root: float
    peak_memory: float
    rank: float | None
    null_rank: float | None
    same: bool

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)


@dataclass(frozen=True)
class Comparison:
    """Results of the variants whose runs are all done.

    Attributes:
        tables: by budget unit; the rows are in the order of the study file.
        missing: names of the variants that are not done, by budget unit.
        unlike: what should be the same in all runs and is not, with its values.
        step_times: for variants whose equal time is that of their runs, by how much the time of a step differs between
            those runs; a fraction of the shortest.
    """

    tables: dict[Unit, list[Row]]
    missing: dict[Unit, list[str]]
    unlike: dict[str, list[str]]
    step_times: dict[str, float]


SAME = {"data_fingerprint": "data", "torch": "torch", "device": "device", "validation_tokens": "validation tokens"}
"""Keys of ``start`` records that should be the same in all runs, and how they are called."""


def compare(worker: Worker) -> Comparison:
    """Compute the results of a study, as far as its runs are done."""
    study = worker.study
    tables: dict[Unit, list[Row]] = {}
    missing: dict[Unit, list[str]] = {}
    for unit in study.budget:
        variants = [variant for variant in study.variants.values() if unit in variant.units]
        done = {variant.name: _done(worker, variant, unit) for variant in variants}
        losses = {name: tuple(outcome.loss for _, outcome in runs) for name, runs in done.items() if runs}
        tables[unit] = [
            _row(worker, variant, unit, done[variant.name], losses.get(variant.control or ""))
            for variant in variants
            if variant.name in losses
        ]
        missing[unit] = [name for name in done if name not in losses]
    outcomes = [outcome for run in worker.runs() if (outcome := worker.outcome(run)) is not None]
    starts = [outcome.start for outcome in outcomes if outcome.start is not None]
    values = {key: sorted({str(start[key]) for start in starts if start.get(key) is not None}) for key in SAME}
    unlike = {SAME[key]: found for key, found in values.items() if len(found) > 1}
    timed = [each for each in study.variants.values() if "seconds" in each.units and each.seconds_per_step is None]
    spreads = {variant.name: _spread(worker, variant) for variant in timed}
    return Comparison(tables, missing, unlike, spreads)


def _spread(worker: Worker, variant: Variant) -> float:
    """Longest time per step over shortest, less 1, of the runs with equal tokens."""
    runs = [(run, worker.outcome(run)) for run in worker.compared(variant, "tokens") or []]
    times = [outcome.used("seconds") / run.steps for run, outcome in runs if outcome and outcome.used("seconds") > 0]
    return max(times) / min(times) - 1 if times else 0.0


def difference(losses: Sequence[float], control: Sequence[float]) -> Difference:
    """Differences paired by seed, with the 95 % confidence interval of their mean (Student's t)."""
    values = tuple(loss - reference for loss, reference in zip(losses, control, strict=True))
    count = len(values)
    if count < 2 or not all(map(math.isfinite, values)):
        return Difference(values, math.nan)
    t = T_95[count - 2] if count - 2 < len(T_95) else 1.96
    return Difference(values, t * statistics.stdev(values) / math.sqrt(count))


def _done(worker: Worker, variant: Variant, unit: Unit) -> list[tuple[Run, Outcome]]:
    """A variant's runs, one per seed; none if not all of them are done."""
    runs = worker.compared(variant, unit) or []
    done = [(run, outcome) for run in runs if (outcome := worker.outcome(run)) is not None]
    return done if len(done) == len(runs) else []


def _row(
    worker: Worker, variant: Variant, unit: Unit, done: list[tuple[Run, Outcome]], control: tuple[float, ...] | None
) -> Row:
    run = done[0][0]
    losses = tuple(outcome.loss for _, outcome in done)
    summaries = [outcome.summary for _, outcome in done if outcome.summary]
    layers = [layer for summary in summaries for layer in summary["ranks"].values()]
    nulls = [layer["null_rank"] for layer in layers if layer["null_rank"] is not None]

    return Row(
        variant=variant,
        unit=unit,
        point=run.point,
        edges=tuple(variant.at_an_edge(run.point)),
        losses=losses,
        difference=None if control is None else difference(losses, control),
        steps=run.steps,
        used={each: _median(summaries, each) for each in ("tokens", "flops", "seconds")},
        parameters=_median(summaries, "parameters"),
        parameters_root=_parameters(worker, variant),
        peak_memory=_median(summaries, "peak_memory"),
        rank=statistics.fmean(layer["rank"] for layer in layers) if layers else None,
        null_rank=statistics.fmean(nulls) if nulls else None,
        same=unit != "tokens" and run in (worker.compared(variant, "tokens") or []),
    )


def _parameters(worker: Worker, variant: Variant) -> float:
    """Median number of parameters of the variant at the end of the chain of controls; nan if unknown."""
    runs = worker.compared(worker.study.root(variant), "tokens") or []
    summaries = [outcome.summary for run in runs if (outcome := worker.outcome(run)) and outcome.summary]
    return _median(summaries, "parameters")


def _median(summaries: Sequence[dict[str, Any]], key: str) -> float:
    values = [float(summary[key]) for summary in summaries if summary.get(key) is not None]
    return statistics.median(values) if values else math.nan
