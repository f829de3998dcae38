"""Stopping on request: a signal to any process, and all of them save and leave with exit status 75."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_STOPPED = 75
"""Saved and stopped on request: run the same command again (``EX_TEMPFAIL`` of sysexits.h)."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """The run was stopped on request and can go on. The message says where it stands."""


class StopRequest:
    """Remembers that this process was asked to stop. Handlers are in place from ``listen`` to ``close``.

    Attributes:
        signal: name of the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.told: Callable[[str], None] = lambda name: None
        self._at_once = False
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None
        self._grace_seconds: float | None = None

    def listen(self, grace_seconds: float | None = None) -> None:
        """Take over the signals.

        Args:
            grace_seconds: from a signal on; a process that is then still there leaves with status 75 without saving.
                None: no limit.
        """
        self._grace_seconds = grace_seconds
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._receive)

    def close(self) -> None:
        """Give the signals back, and forget the limit."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if self._timer:
            self._timer.cancel()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Where there is nothing to save, a request raises ``Stopped`` at once instead of being remembered."""
        if self.signal:
            raise Stopped(f"stopped on {self.signal} before the training began; nothing is lost")
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first, self.signal = self.signal is None, self.signal or signal.Signals(number).name
        if first:
            self.told(self.signal)
            if self._grace_seconds is not None:
                self._timer = threading.Timer(self._grace_seconds, self._leave)
                self._timer.daemon = True
                self._timer.start()
        if self._at_once:
            self._at_once = False
            raise Stopped(f"stopped on {self.signal} before the training began; nothing is lost")

    def _leave(self) -> None:
        line = f"no safe point within checkpoint.grace_seconds {self._grace_seconds:g} after {self.signal}: leaving"
        os.write(2, f"{line}; the next start goes on from the last complete checkpoint\n".encode())
        os._exit(EXIT_STOPPED)
