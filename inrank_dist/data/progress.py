"""Shows progress during data preparation: bars on a terminal, otherwise log lines."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from rich.console import Console
from rich.progress import (
    BarColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars

from .stored import Advance

#: For whichever process of a job does the work; commands enable this logger on all processes.
log = logging.getLogger("inrank_dist.preparation")

#: Seconds between log lines of a long phase, and between updates of a bar.
LINE_INTERVAL_S, BAR_INTERVAL_S = 30.0, 0.1


@contextmanager
def phase(title: str, total: int | None, *, enabled: bool) -> Iterator[Advance]:
    """Show the progress of a phase while the block runs. ``total`` is in bytes; None if unknown, which shows a spinner.

    On a terminal this shows a bar on stderr, with MB/s and an estimate of the remaining time. Otherwise it logs a line
    at the start, at the end, and every ``LINE_INTERVAL_S`` in between. Shows nothing unless ``enabled``.
    """
    if not enabled:
        yield lambda done: None
        return
    if sys.stderr.isatty():
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        speed = (TransferSpeedColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Bars(*columns, *speed, console=Console(stderr=True)) as bars:
            task = bars.add_task(title, total=total)
            throttled = _Throttled(BAR_INTERVAL_S, lambda done: bars.update(task, completed=done))
            yield throttled.advance
            done = max(total or throttled.done, 1)
            bars.update(task, total=done, completed=done)
        return
    log.info("%s ...", title)
    start = time.monotonic()

    def line(done: int) -> None:
        seconds = max(time.monotonic() - start, 1e-9)
        share, left = f"{done / 1e6:,.0f} MB", ""
        if total:
            share, left = f"{done / total:.0%}", f", about {seconds * max(total / max(done, 1) - 1, 0):.0f} s left"
        log.info("%s: %s after %.0f s (%.1f MB/s)%s", title, share, seconds, done / seconds / 1e6, left)

    throttled = _Throttled(LINE_INTERVAL_S, line)
    yield throttled.advance
    seconds = time.monotonic() - start
    log.info("%s: done in %.1f s (%.1f MB/s)", title, seconds, throttled.done / max(seconds, 1e-9) / 1e6)


class _Throttled:
    """Accumulates a count and reports it at most once every ``seconds``."""

    def __init__(self, seconds: float, report: Advance) -> None:
        self._seconds, self._report = seconds, report
        self.done = 0
        self._reported_at = time.monotonic()

    def advance(self, done: int) -> None:
        self.done += done
        if (now := time.monotonic()) - self._reported_at >= self._seconds:
            self._reported_at = now
            self._report(self.done)


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Disable the progress bars of ``datasets``, which are printed even if stderr is a file."""
    enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()
