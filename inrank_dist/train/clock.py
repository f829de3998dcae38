"""Measurement of training time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Clock for training time in seconds, excluding validation and checkpoints.

    Args:
        seconds: training time before the checkpoint that the run resumes from.
        tokens: tokens processed before that checkpoint.
    """

    def __init__(self, seconds: float = 0.0, tokens: int = 0) -> None:
        self._began = time.perf_counter() - seconds
        self._mark: tuple[float, tuple[float, ...]] = (seconds, (tokens, 0.0, 0.0))

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def rates(self, *totals: float) -> list[float]:
        """Return the increase per second of each total since the last call.

        The totals are the processed tokens and two others that start at 0.
        """
        now, (then, before) = self.seconds, self._mark
        self._mark = (now, totals)
        return [(total - was) / max(now - then, 1e-9) for total, was in zip(totals, before, strict=True)]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the clock during the context."""
        stopped = time.perf_counter()
        yield
        self._began += time.perf_counter() - stopped
