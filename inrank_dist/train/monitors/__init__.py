"""Destinations for a run's records: a file, TensorBoard, the console.

A record is a plain dict with a ``kind``. Only process 0 has monitors. The others hold an empty ``Monitors``, so that
the loop does not depend on the process. Monitors ignore kinds and keys that they do not know.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Protocol

from ...runtime.errors import UserError
from .console import ConsoleMonitor
from .jsonl import JsonlMonitor, read_metrics
from .tensorboard import TensorBoardMonitor

__all__ = ["ConsoleMonitor", "JsonlMonitor", "Monitor", "Monitors", "TensorBoardMonitor", "read_metrics"]


class Monitor(Protocol):
    """A destination for records."""

    def write(self, record: dict[str, Any]) -> None:
        """Write a record, without modifying it."""

    def close(self) -> None:
        """Close the destination. May be called twice."""


class Monitors:
    """Passes every record to each monitor, in order."""

    def __init__(self, monitors: Iterable[Monitor] = ()) -> None:
        self._monitors = list(monitors)

    def write(self, record: dict[str, Any]) -> None:
        """Pass ``record`` to every monitor, with the time in seconds since the epoch as ``time``.

        Raises:
            UserError: a file cannot be written.
        """
        timed = {**record, "time": round(time.time(), 3)}
        try:
            for monitor in self._monitors:
                monitor.write(timed)
        except BrokenPipeError:  # the reader of a pipe has exited; the command line handles it
            raise
        except OSError as error:
            raise UserError(
                f"the run's records cannot be written ({error.strerror or error}); fix that and run the same command "
                "again, which resumes from the last complete checkpoint"
            ) from None

    def close(self) -> None:
        """Close every monitor even if some fail, then raise the first error."""
        failure: Exception | None = None
        for monitor in self._monitors:
            try:
                monitor.close()
            except Exception as error:
                failure = failure or error
        if failure:
            raise failure
