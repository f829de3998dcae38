"""The runs of a study, and the workers that execute them.

Several workers, on one or more machines, may work on one study. Each takes runs that no other worker has taken.
"""

import hashlib
import json
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from ..config import Config
from ..runtime import yaml_text
from ..runtime.errors import EXIT_MISTAKE, UserError, error_line
from ..runtime.lock import Lock, LockHeld
from ..runtime.progress import phase
from ..runtime.signals import EXIT_STOPPED, handling_stop_signals
from ..runtime.stop import Stopped
from ..runtime.yaml_text import shown
from ..train.monitors.jsonl import read_metrics
from .settings import Point, Study, Unit, Variant

log = logging.getLogger("inrank_dist")

POLL_SECONDS = 1.0


DIVERGED = "train.max_skipped"
"""Part of the error of a run that diverged."""

CHOSEN_BY_STUDY = ("run.dir", "run.name")
"""Settings of a run that its name does not depend on."""


@dataclass(frozen=True)
class Outcome:
    """Result of a run: its ``summary`` record, or None and the reason if it diverged; and its ``start`` record."""

    summary: dict[str, Any] | None
    failure: str = ""
    start: dict[str, Any] | None = None

    @property
    def loss(self) -> float:
        """Validation loss in nats; infinite if the run failed."""
        value = (self.summary or {}).get("validation_loss")
        return float("inf") if value is None else float(value)

    def used(self, unit: Unit) -> float:
        """How much of a unit the run used; nan if unknown."""
        value = (self.summary or {}).get(unit)
        return float("nan") if value is None else float(value)


@dataclass(frozen=True)
class Run:
    """One run of a study. Its folder is named by its settings alone, so runs with equal settings are the same run."""

    study: Study
    variant: Variant
    point: Point
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """The seed and a digest of all settings that differ from their defaults, so that the name stays the same when
        a later version adds settings."""
        return _name_of(self)

    @property
    def folder(self) -> Path:
        return self.study.folder / "runs" / self.name

    def outcome(self) -> Outcome | None:
        """The result; None while the run is not done."""
        failed = self.folder / "failed"
        if failed.exists():
            return Outcome(None, failed.read_text().strip())
        if not (self.folder / "metrics.jsonl").exists():
            return None
        records = {record["kind"]: record for record in read_metrics(self.folder / "metrics.jsonl")}
        if "summary" not in records:
            return None
        if records["summary"].get("validation_loss") is None:
            raise UserError(f"{self.folder} has no validation loss; remove it, so that the study runs it again")
        self._check_settings()
        return Outcome(records["summary"], start=records.get("start"))

    def config(self) -> Config:
        """The settings."""
        return self.study.config(self.variant, self.point, self.seed, self.steps, self.folder)

    def file(self, kind: str) -> Path:
        """The settings as they were executed (``yaml``), or the output (``txt``)."""
        return self.study.folder / "logs" / f"{self.name}.{kind}"

    def _check_settings(self) -> None:
        """The name has only the settings that differed from their defaults, and a later version may change those."""
        if not self.file("yaml").exists():
            return
        executed, now = yaml_text.read(self.file("yaml")), yaml_text.load(self.config().to_yaml())
        for section, settings in now.items():
            for key, value in settings.items():
                was = executed.get(section, {}).get(key, value)
                if was != value and f"{section}.{key}" not in CHOSEN_BY_STUDY:
                    raise UserError(
                        f"{self.folder} was trained with {section}.{key} {shown(was)}, which is {shown(value)} now; "
                        "remove this folder, so that the study runs it again"
                    )

    def title(self) -> str:
        """Description for log lines."""
        point = "".join(f", {key} {value}" for key, value in self.point)
        return f"{self.variant.name}, seed {self.seed}{point}, {self.steps} steps"


@cache  # called at every poll, and reads the config from a file
def _name_of(run: Run) -> str:
    return _name(run, run.study.config(run.variant, run.point, run.seed, run.steps))


def _name(run: Run, config: Config) -> str:
    settings = {key: value for key, value in config.changed().items() if key not in CHOSEN_BY_STUDY}
    digest = hashlib.sha256(json.dumps([settings, run.study.processes], sort_keys=True).encode()).hexdigest()[:10]
    return f"seed-{run.seed}-{digest}"


class Worker:
    """Executes the runs of a study until all are done, possibly alongside other workers.

    Args:
        threads: per process of a run; None leaves it to torch or the launcher.
    """

    def __init__(self, study: Study, threads: int | None = None) -> None:
        self.study, self._threads = study, threads
        self._outcomes: dict[Run, Outcome] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._stop_signal = 0

    def work(self) -> None:
        """Execute all runs that no other worker has taken, and wait for those that are taken.

        Raises:
            UserError: a run rejected its settings; has the run's message.
            Stopped: a signal arrived; the current run has been saved.
        """
        activity = f"study {self.study.folder.name}"
        with handling_stop_signals(self._handle), phase(activity, unit="runs") as progress:
            while runs := self.pending():
                self._raise_if_stopped()
                known = len(self.runs())
                progress.report(activity, known - len(runs), known)
                if not any(self._take(run) for run in runs):
                    time.sleep(POLL_SECONDS)

    def pending(self) -> list[Run]:
        """Runs that can be started now or are being executed by others; empty if all are done."""
        while True:
            runs = self.runs()
            left = [run for run in runs if self.outcome(run) is None]
            # Another worker may just have finished the last run of a grid, which adds further runs.
            if left or self.runs() == runs:
                return left

    def outcome(self, run: Run) -> Outcome | None:
        """Result of a run, cached."""
        if run not in self._outcomes and (found := run.outcome()):
            self._outcomes[run] = found
        return self._outcomes.get(run)

    def runs(self) -> list[Run]:
        """All runs known so far: for each grid its tuning runs, then the comparison runs at its best point."""
        found: list[Run] = []
        for variant in self.study.variants.values():
            found += self.tuning(variant) if len(variant.points) > 1 else []
            for unit in variant.units:
                found += self.compared(variant, unit) or []
        return list(dict.fromkeys(found))

    def tuning(self, variant: Variant) -> list[Run]:
        """The tuning runs of a variant's grid."""
        return [
            Run(self.study, variant, point, seed, self.study.steps_for_tokens(variant, point))
            for point in variant.points
            for seed in self.study.tuning_seeds
        ]

    def best(self, variant: Variant) -> Point | None:
        """The grid point with the lowest mean validation loss over the tuning seeds; None until all runs are done.

        The first one if all diverged.
        """
        if len(variant.points) == 1:
            return variant.points[0]
        losses: dict[Point, list[float]] = {}
        for run in self.tuning(variant):
            outcome = self.outcome(run)
            if outcome is None:
                return None
            losses.setdefault(run.point, []).append(outcome.loss)
        return min(losses, key=lambda point: statistics.fmean(losses[point]))

    def compared(self, variant: Variant, unit: Unit) -> list[Run] | None:
        """A variant's runs for an equal budget, one per seed; None while their length is unknown, or if it cannot be
        known because a run diverged."""
        point = self.best(variant)
        steps = None if point is None else self._steps(variant, point, unit)
        if point is None or steps is None:
            return None
        return [Run(self.study, variant, point, seed, steps) for seed in self.study.seeds]

    def _steps(self, variant: Variant, point: Point, unit: Unit) -> int | None:
        """Number of steps that use up the budget, given what the runs with equal tokens used per step."""
        steps = self.study.steps_for_tokens(variant, point)
        budget, root = self.study.budget[unit], self.study.root(variant)
        if unit == "tokens" or (budget is None and variant is root):
            return steps
        used = self._typical_use(variant, unit)
        allowed = self._typical_use(root, unit) if budget is None else budget
        if used is None or allowed is None:
            return None
        # Within 1 % use the same run.
        return steps if abs(allowed / used - 1) < 0.01 else max(1, round(steps * allowed / used))

    def _typical_use(self, variant: Variant, unit: Unit) -> float | None:
        """Median use of the runs with equal tokens; None until all are done, or if one diverged."""
        point = self.best(variant)
        if point is not None and unit == "seconds" and variant.seconds_per_step is not None:
            return variant.seconds_per_step * self.study.steps_for_tokens(variant, point)
        uses = [
            outcome.used(unit) if (outcome := self.outcome(run)) else math.nan
            for run in self.compared(variant, "tokens") or []
        ]
        return statistics.median(uses) if uses and all(0 < use < math.inf for use in uses) else None

    def _take(self, run: Run) -> bool:
        """Execute a run unless another worker holds its lock. Returns whether the run is done."""
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(run.folder.parent / f".{run.name}.lock")
        try:
            lock.acquire(0)
        except LockHeld:
            return False
        try:
            if run.outcome() is None:
                self._execute(run)
            return True
        finally:
            lock.release()

    def _execute(self, run: Run) -> None:
        config, file = run.config(), run.file("yaml")
        if _name(run, config) != run.name:
            raise UserError(f"{run.study.base} has changed since the study began; start the same command again")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(config.to_yaml())
        log.info("%s ...", run.title())
        start = time.monotonic()
        with run.file("txt").open("ab") as output:
            self._process = subprocess.Popen(
                [*self._command(), "train", "--config", str(file)],
                stdout=output,
                stderr=output,
                env=self._environment(),
                start_new_session=True,  # signals from a terminal reach only this process, which forwards them
            )
            try:
                self._signal(self._stop_signal)
                status = self._process.wait()
            finally:
                self._process = None
        if status == EXIT_STOPPED:
            self._stop_signal = self._stop_signal or signal.SIGTERM  # the run itself was stopped
        self._raise_if_stopped()
        if status:
            self._record_failure(run, status, run.file("txt"))
        elif outcome := self.outcome(run):
            log.info("%s: validation loss %.4f in %.0f s", run.title(), outcome.loss, time.monotonic() - start)

    def _raise_if_stopped(self) -> None:
        if self._stop_signal:
            raise Stopped("stopped; the same command goes on from there")

    def _record_failure(self, run: Run, status: int, output: Path) -> None:
        """Record divergence as a result. Other failures, such as rejected settings or a lost process, are errors."""
        message = error_line(output.read_text(errors="replace")).removeprefix("error: ")
        if status != EXIT_MISTAKE or DIVERGED not in message:
            raise UserError(f"{run.title()} ended with status {status} ({message}); see {output}")
        run.folder.mkdir(exist_ok=True)
        (run.folder / "failed").write_text(f"{message}\n")
        log.warning("%s: it diverged", run.title())

    def _command(self) -> Sequence[str]:
        if self.study.processes == 1:
            return [sys.executable, "-m", "inrank_dist"]
        return [sys.executable, "-m", "inrank_dist.launcher.torchrun", "-n", str(self.study.processes)]

    def _environment(self) -> dict[str, str]:
        threads = (
            {"OMP_NUM_THREADS": str(self._threads)} if self._threads and "OMP_NUM_THREADS" not in os.environ else {}
        )
        return {**os.environ, **threads}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Forward a stop request to the current run, which saves and exits."""
        self._stop_signal = number
        self._signal(number)

    def _signal(self, number: int) -> None:
        process = self._process
        if number and process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
