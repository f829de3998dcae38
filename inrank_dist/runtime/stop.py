"""Stopping on request: after a signal to any process, all processes save and exit with status 75."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from .console import write_stderr
from .signals import EXIT_STOPPED, NOTHING_LOST, STOP_SIGNALS, stop_signals


class Stopped(BaseException):
    """The run was stopped on request and can be resumed. The message says at which step it stopped.

    Like ``KeyboardInterrupt`` this is not an ``Exception``, which data-loading libraries catch as errors in the data.
    """


class StopRequest:
    """Records that this process was asked to stop. Signal handlers are installed from ``listen`` to ``close``.

    A thread receives each signal at once, even while the main thread waits in a collective, where Python's handlers do
    not run.

    Attributes:
        signal: name of the first signal received, or None.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._callback: Callable[[str], None] = lambda name: None
        self._raise_now = self._exit_now = False
        self._previous: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._grace_seconds: float | None = None
        self._sockets: tuple[socket.socket, socket.socket] | None = None

    def listen(self, grace_seconds: float | None = None) -> None:
        """Install the signal handlers.

        Args:
            grace_seconds: how long after a signal the process may still run before it exits without saving, with status
                1 (75 if there is nothing to save). None: no limit.
        """
        self._grace_seconds = grace_seconds
        self._sockets = socket.socketpair()
        self._sockets[1].setblocking(False)
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._handle)
        signal.set_wakeup_fd(self._sockets[1].fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._receive, args=(self._sockets[0],), name="signals", daemon=True).start()

    def on_signal(self, callback: Callable[[str], None]) -> None:
        """Call ``callback`` with the name of the first signal, now or when it arrives."""
        with self._lock:
            self._callback = callback
            if self.signal:
                callback(self.signal)

    def close(self) -> None:
        """Restore the signal handlers and cancel the grace period. A process that was asked to stop ignores further
        signals, because it is exiting."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self.signal else handler)
        self._previous.clear()
        if self._timer:
            self._timer.cancel()
        if self._sockets:
            self._sockets[1].close()  # ends the thread
            self._sockets = None

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Within the context a request raises ``Stopped`` at once: there is nothing to save."""
        self._raise_now = True
        try:
            if self.signal:
                raise Stopped
            yield
        finally:
            self._raise_now = False

    @contextmanager
    def exiting(self) -> Iterator[None]:
        """Within the context a request exits with status 75. For when the main thread waits in C++ for other processes
        and there is nothing to save."""
        self._exit_now = True
        try:
            if self.signal:
                self._exit(NOTHING_LOST)
            yield
        finally:
            self._exit_now = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._record(number)
        if self._raise_now:
            self._raise_now = False
            raise Stopped

    def _receive(self, end: socket.socket) -> None:
        with end, suppress(OSError):
            while received := end.recv(1):
                if received[0] in STOP_SIGNALS:
                    self._record(received[0])

    def _record(self, number: int) -> None:
        if not self._lock.acquire(timeout=0.1):  # the handler may have interrupted the main thread while it held it
            return
        try:
            if self.signal is not None:
                return
            self.signal = signal.Signals(number).name
            if self._exit_now:
                self._exit(NOTHING_LOST)
            self._callback(self.signal)
            if self._grace_seconds is not None:
                self._timer = threading.Timer(self._grace_seconds, self._exit_unsaved)
                self._timer.daemon = True
                self._timer.start()
        finally:
            self._lock.release()

    def _exit_unsaved(self) -> None:
        if self._raise_now:  # the main thread is in C++ and has not run the handler yet
            self._exit(NOTHING_LOST)
        line = f"no safe point within checkpoint.grace_seconds {self._grace_seconds:g} after {self.signal}: exiting"
        self._exit(f"{line}; the next start resumes from the last complete checkpoint", 1)

    def _exit(self, line: str, status: int = EXIT_STOPPED) -> None:
        write_stderr(line)
        os._exit(status)
