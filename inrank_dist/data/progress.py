"""What the user sees while data is prepared: bars on a terminal, log lines elsewhere."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from .stored import Advance

#: Of the process that does the work, whichever of a job it is: commands let it speak where other processes are silent.
log = logging.getLogger("inrank_dist.preparation")

#: Seconds between two log lines of a long phase, and between two movements of a bar.
LINE_EVERY_S, MOVE_EVERY_S = 30.0, 0.1


@contextmanager
def phase(title: str, total: int | None, *, enabled: bool) -> Iterator[Advance]:
    """Show one phase of ``total`` bytes (None: unknown, a spinner) while the block runs; yields its ``Advance``.

    A bar on stderr where that is a terminal; else one log line at the start, one at the end, and one every
    ``LINE_EVERY_S`` between them; nothing at all unless ``enabled``.
    """
    if not enabled:
        yield lambda done: None
        return
    if sys.stderr.isatty():
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        with Bars(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
            task = bars.add_task(title, total=total)
            moved = _Every(MOVE_EVERY_S, lambda done: bars.update(task, completed=done))
            yield moved.advance
            bars.update(task, total=1, completed=1)
        return
    log.info("%s ...", title)
    start = time.monotonic()

    def line(done: int) -> None:
        share = f"{done / total:.0%}" if total else f"{done / 1e6:,.0f} MB"
        log.info("%s: %s after %.0f s", title, share, time.monotonic() - start)

    yield _Every(LINE_EVERY_S, line).advance
    log.info("%s: done in %.1f s", title, time.monotonic() - start)


class _Every:
    """Counts, and tells the count at most every ``seconds``."""

    def __init__(self, seconds: float, tell: Advance) -> None:
        self._seconds, self._tell = seconds, tell
        self._done = 0
        self._told = time.monotonic()

    def advance(self, done: int) -> None:
        self._done += done
        if (now := time.monotonic()) - self._told >= self._seconds:
            self._told = now
            self._tell(self._done)


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Hide the bars of ``datasets`` itself, which would print even where stderr is a file."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
