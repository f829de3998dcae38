"""Where a run's records go: a file, TensorBoard, the console.

A record is a plain dict with a ``kind``. Only process 0 has monitors; the others hold an empty
``Monitors``, so that the loop never asks which process it is. Monitors never fail on a kind or a key they
do not know.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from inrank_dist.train.monitors.console import ConsoleMonitor
from inrank_dist.train.monitors.jsonl import JsonlMonitor, read_metrics
from inrank_dist.train.monitors.tensorboard import TensorBoardMonitor

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
        """Give ``record`` to every monitor."""
        for monitor in self._monitors:
            monitor.write(record)

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
