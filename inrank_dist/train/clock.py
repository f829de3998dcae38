"""Training time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Training time in seconds, without validation and checkpoints.

    Args:
        seconds: so far, in the run that is continued.
        tokens: so far.
    """

    def __init__(self, seconds: float = 0.0, tokens: int = 0) -> None:
        self._began = time.perf_counter() - seconds
        self._mark: tuple[float, tuple[float, ...]] = (seconds, (tokens, 0.0, 0.0))

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def rates(self, *totals: float) -> list[float]:
        """How much each total has grown per second since the last call."""
        now, (then, before) = self.seconds, self._mark
        self._mark = (now, totals)
        return [(total - was) / max(now - then, 1e-9) for total, was in zip(totals, before, strict=True)]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The clock stands still meanwhile."""
        stopped = time.perf_counter()
        yield
        self._began += time.perf_counter() - stopped
