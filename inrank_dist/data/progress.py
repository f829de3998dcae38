"""What the user sees while data is prepared: bars on a terminal, log lines elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import datasets
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

logger = logging.getLogger("inrank_dist")

#: Reports that so many more units of a phase are done.
Advance = Callable[[int], None]


@contextmanager
def phase(title: str, total: int | None, *, enabled: bool) -> Iterator[Advance]:
    """Show one phase of ``total`` units (None: unknown, a spinner) while the block runs; yields its
    ``Advance``.

    A bar on stderr where that is a terminal; else one ``inrank_dist`` log line at the start and one at the
    end; nothing at all unless ``enabled``.
    """
    if not enabled:
        yield lambda units: None
        return
    if sys.stderr.isatty():
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        with Bars(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
            task = bars.add_task(title, total=total)
            yield lambda units: bars.advance(task, units)
            bars.update(task, total=1, completed=1)
        return
    logger.info("%s ...", title)
    start = time.monotonic()
    yield lambda units: None
    logger.info("%s: done in %.1f s", title, time.monotonic() - start)


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
