"""Progress of work that takes longer than a moment: a bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

#: Called with the amount of work just done.
Advance = Callable[[float], None]

#: For whichever process of a job does the work; commands enable this logger on all processes.
log = logging.getLogger("inrank_dist.progress")

#: Seconds before anything is shown, between log lines, and between updates of a bar.
PATIENCE_S, LINE_INTERVAL_S, BAR_INTERVAL_S = 2.0, 30.0, 0.2

#: Environment variable; ``off`` shows nothing at all.
SWITCH = "INRANK_PROGRESS"

Item = TypeVar("Item")

#: What holds the terminal now and shows its own bar, such as that of a training. Phases then write lines.
terminal_holders: set[object] = set()


@contextmanager
def phase(
    activity: str,
    total: float | None = None,
    *,
    unit: str = "",
    enabled: bool = True,
    patience: float | None = None,
    bar: bool = True,
) -> Iterator[Work]:
    """Show how far the work of a block is, once it has taken ``patience`` seconds (default: ``PATIENCE_S``).

    On a terminal this shows a bar on stderr, with the time and an estimate of the remaining time. Otherwise it logs a
    line when ``patience`` is over, every ``LINE_INTERVAL_S`` from then on, and at the end. Blocks may be nested.

    Args:
        activity: what is done, such as ``"hashing step-00000100"``.
        total: amount of work; None if unknown.
        unit: what is counted, such as ``"layers"``. ``"bytes"`` are shown as MB and MB/s. Empty: only the share.
        enabled: whether this process reports. Nothing is shown otherwise.
        bar: whether a bar may be shown. False where another process of the job may show one on the same terminal.

    Yields:
        A function to call with the amount of work just done, from any thread.
    """
    work = Work(activity, total, unit)
    seconds = PATIENCE_S if patience is None else patience
    if not enabled or os.environ.get(SWITCH) == "off":
        yield work
        return
    display: _Bar | _Lines = _Bar(work) if bar and sys.stderr.isatty() and not terminal_holders else _Lines(work)
    ended = threading.Event()
    if seconds <= 0:
        display.show()

    def watch() -> None:
        if seconds > 0:
            if ended.wait(seconds):
                return
            display.show()
        while not ended.wait(display.interval):
            display.update()

    # A thread, because work such as an SVD or a collective cannot call back.
    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    finished = False
    try:
        yield work
        finished = True
    finally:
        ended.set()
        thread.join()
        display.close(finished)


def counted(
    items: Iterable[Item], activity: str, total: int | None = None, *, unit: str = "", enabled: bool = True
) -> Iterator[Item]:
    """Yield the items and show how many are done, see ``phase``. ``total`` defaults to their length, if known."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with phase(activity, total, unit=unit, enabled=enabled) as advance:
        for item in items:
            yield item
            advance(1)


class Work:
    """How far some work is. May be called by several threads."""

    def __init__(self, activity: str, total: float | None, unit: str) -> None:
        self.name = self.activity = activity
        self.total, self.unit = total, unit
        self.done, self._lock = 0.0, threading.Lock()
        self._start = self._since = time.monotonic()

    def __call__(self, done: float) -> None:
        """Add the amount of work just done."""
        with self._lock:
            self.done += done

    def report(self, activity: str, done: float = 0.0, total: float | None = None) -> None:
        """Say what is done now, and how much of it, for work whose parts are not known in advance."""
        with self._lock:
            if activity != self.activity:
                self._since = time.monotonic()
            self.activity, self.done, self.total = activity, done, total

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    @property
    def left(self) -> float | None:
        """Estimate of the remaining seconds; None if unknown."""
        seconds = time.monotonic() - self._since
        return seconds * max(self.total / self.done - 1, 0) if self.total and self.done else None

    @property
    def rate(self) -> str:
        return f"{self.done / self.seconds / 1e6:.1f} MB/s" if self.unit == "bytes" and self.done else ""

    @property
    def amount(self) -> str:
        """How much is done, in words; empty if that is unknown."""
        if self.unit == "bytes":
            return f"{self.done / 1e6:,.0f} MB" if self.done else ""
        if not self.unit:
            return ""
        return f"{self.done:,.0f} of {self.total:,.0f} {self.unit}" if self.total else f"{self.done:,.0f} {self.unit}"


class _Lines:
    """Log lines."""

    interval = LINE_INTERVAL_S

    def __init__(self, work: Work) -> None:
        self._work, self._shown = work, False

    def show(self) -> None:
        self._shown = True
        log.info("%s ...", self._work.activity)

    def update(self) -> None:
        work = self._work
        share = f"{work.done / work.total:.0%}" if work.total else work.amount
        known = [f"{share} after {work.seconds:.0f} s".strip() + (f" ({work.rate})" if work.rate else "")]
        if work.left is not None:
            known.append(f"about {work.left:.0f} s left")
        log.info("%s: %s", work.activity, ", ".join(known))

    def close(self, finished: bool) -> None:
        work = self._work
        if self._shown and finished:
            rate = f" ({work.rate})" if work.rate else ""
            log.info("%s: done in %.1f s%s", work.name, work.seconds, rate)


class _Bar:
    """A bar below those of the blocks around this one."""

    interval = BAR_INTERVAL_S
    _bars: Bars | None = None
    _open = 0
    _lock = threading.Lock()

    def __init__(self, work: Work) -> None:
        self._work = work
        self._task: TaskID | None = None

    def show(self) -> None:
        with _Bar._lock:
            if _Bar._bars is None:
                _Bar._bars = _new_bars()
                _Bar._bars.start()
            _Bar._open += 1
            self._task = _Bar._bars.add_task(self._work.activity, total=self._work.total, amount="")
        self.update()

    def update(self) -> None:
        work = self._work
        with _Bar._lock:
            if _Bar._bars is not None and self._task is not None:
                amount = ", ".join(part for part in (work.amount, work.rate) if part)
                _Bar._bars.update(
                    self._task,
                    description=work.activity,
                    completed=work.done,
                    total=work.total,
                    amount=amount,
                    refresh=True,
                )

    def close(self, finished: bool) -> None:
        if self._task is None:
            return
        self._work.activity = self._work.name
        if finished:  # a source that turned out smaller or larger than announced is done, too
            self._work.total = self._work.done = self._work.done or self._work.total or 1
        self.update()
        with _Bar._lock:
            _Bar._open = max(_Bar._open - 1, 0)
            if _Bar._bars is not None and not _Bar._open:
                _Bar._bars.stop()
                _Bar._bars = None


def end_bars() -> None:
    """Give the terminal back after an error, which may have left a loop over ``counted`` unfinished."""
    with _Bar._lock:
        if _Bar._bars is not None:
            _Bar._bars.stop()
            _Bar._bars, _Bar._open = None, 0


def _new_bars() -> Bars:
    # Imported here, because most work is done before a bar is needed.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    facts = (TextColumn("{task.fields[amount]}", markup=False), TimeElapsedColumn(), TimeRemainingColumn())
    # What else is printed appears above the bar, unless it goes to a file.
    return Progress(
        *columns,
        *facts,
        console=Console(stderr=True),
        auto_refresh=False,
        redirect_stdout=sys.stdout.isatty(),
    )


class CurrentStderrHandler(logging.StreamHandler):
    """Writes to what ``sys.stderr`` is now: a bar replaces it, so that lines appear above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr
