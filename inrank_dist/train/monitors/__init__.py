"""Where a run's records go: a file, TensorBoard, the console.

A record is a plain dict with a ``kind``. Only process 0 has monitors; the others hold an empty
``Monitors``, so that the loop never asks which process it is. Monitors never fail on a kind or a key they
do not know.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from ...runtime.errors import UserError
from .console import ConsoleMonitor
from .jsonl import JsonlMonitor, read_metrics
from .tensorboard import TensorBoardMonitor

__all__ = ["ConsoleMonitor", "JsonlMonitor", "Monitor", "Monitors", "TensorBoardMonitor", "read_metrics"]


class Monitor(Protocol):
    """Somewhere records go."""

    def write(self, record: dict[str, Any]) -> None:
        """Take one record; the record is not changed."""

    def close(self) -> None:
        """Finish; closing twice is fine."""


class Monitors:
    """Hands every record to each monitor, in order."""

    def __init__(self, monitors: Iterable[Monitor] = ()) -> None:
        self._monitors = list(monitors)

    def write(self, record: dict[str, Any]) -> None:
        """Give ``record`` to every monitor.

        Raises:
            UserError: a file cannot be written.
        """
        try:
            for monitor in self._monitors:
                monitor.write(record)
        except BrokenPipeError:  # the reader of a pipe has seen enough; the command line knows
            raise
        except OSError as error:
            raise UserError(
                f"the run's records cannot be written ({error.strerror or error}); mend that and run the same command "
                "again, it goes on from the last complete checkpoint"
            ) from None

    def close(self) -> None:
        """Close every monitor, also those after one that fails; the first failure is raised."""
        failure: Exception | None = None
        for monitor in self._monitors:
            try:
                monitor.close()
            except Exception as error:
                failure = failure or error
        if failure:
            raise failure
