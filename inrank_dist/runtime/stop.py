"""Stopping on request: a signal to any process, and all of them save and leave with exit status 75."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from .console import say
from .signals import EXIT_STOPPED, NOTHING_LOST, STOP_SIGNALS, stop_signals


class Stopped(BaseException):
    """The run was stopped on request and can go on. The message says where it stands.

    As ``KeyboardInterrupt``, no ``Exception``: a library that reads data takes those for errors in the data.
    """


class StopRequest:
    """Remembers that this process was asked to stop. Handlers are in place from ``listen`` to ``close``.

    A thread hears of a signal at once, also while the main thread waits in a collective, where Python's own handlers
    do not run.

    Attributes:
        signal: name of the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._told: Callable[[str], None] = lambda name: None
        self._at_once = self._alone = False
        self._before: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._grace_seconds: float | None = None
        self._sockets: tuple[socket.socket, socket.socket] | None = None

    def listen(self, grace_seconds: float | None = None) -> None:
        """Take over the signals.

        Args:
            grace_seconds: from a signal on; a process that is then still there leaves without saving, with status 1
                (75 where there is nothing to save). None: no limit.
        """
        self._grace_seconds = grace_seconds
        self._sockets = socket.socketpair()
        self._sockets[1].setblocking(False)
        for number in stop_signals():
            self._before[number] = signal.signal(number, self._handle)
        signal.set_wakeup_fd(self._sockets[1].fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(self._sockets[0],), name="signals", daemon=True).start()

    def tell(self, told: Callable[[str], None]) -> None:
        """Call ``told`` with the name of the first signal, when it comes or if it has come."""
        with self._lock:
            self._told = told
            if self.signal:
                told(self.signal)

    def close(self) -> None:
        """Give the signals back, and forget the limit. A process that was asked to stop ignores them from now on: it is
        leaving."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.signal else handler)
        self._before.clear()
        if self._timer:
            self._timer.cancel()
        if self._sockets:
            self._sockets[1].close()  # ends the thread
            self._sockets = None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Where there is nothing to save, a request raises ``Stopped`` at once instead of being remembered."""
        self._at_once = True
        try:
            if self.signal:
                raise Stopped
            yield
        finally:
            self._at_once = False

    @contextmanager
    def while_alone(self) -> Iterator[None]:
        """Where this process waits in C for the others and has nothing to save, a request ends it, with status 75."""
        self._alone = True
        try:
            if self.signal:
                self._end(NOTHING_LOST)
            yield
        finally:
            self._alone = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._remember(number)
        if self._at_once:
            self._at_once = False
            raise Stopped

    def _hear(self, end: socket.socket) -> None:
        with end, suppress(OSError):
            while heard := end.recv(1):
                if heard[0] in STOP_SIGNALS:
                    self._remember(heard[0])

    def _remember(self, number: int) -> None:
        if not self._lock.acquire(timeout=0.1):  # the main thread may have been interrupted while it held it
            return
        try:
            if self.signal is not None:
                return
            self.signal = signal.Signals(number).name
            if self._alone:
                self._end(NOTHING_LOST)
            self._told(self.signal)
            if self._grace_seconds is not None:
                self._timer = threading.Timer(self._grace_seconds, self._leave)
                self._timer.daemon = True
                self._timer.start()
        finally:
            self._lock.release()

    def _leave(self) -> None:
        if self._at_once:  # the main thread is in C and has not heard of it
            self._end(NOTHING_LOST)
        line = f"no safe point within checkpoint.grace_seconds {self._grace_seconds:g} after {self.signal}: leaving"
        self._end(f"{line}; the next start goes on from the last complete checkpoint", 1)

    def _end(self, line: str, status: int = EXIT_STOPPED) -> None:
        say(line)
        os._exit(status)
