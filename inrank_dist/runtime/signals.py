"""The signals that request a stop, for the training and its launchers."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

from .console import write_stderr
from .environment import logs_for_node

EXIT_STOPPED = 75
"""Saved and stopped on request: run the same command again (``EX_TEMPFAIL`` of sysexits.h)."""

NOTHING_LOST = "stopped before the training began; nothing is lost, the same command starts it"

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def stop_signals() -> tuple[signal.Signals, ...]:
    """The members of ``STOP_SIGNALS`` that this process handles.

    Excludes SIGHUP if it is ignored: then something such as ``nohup`` wants this process to outlive its terminal.
    """
    return tuple(
        number for number in STOP_SIGNALS if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    )


def exiting_on_stop() -> AbstractContextManager[None]:
    """A stop request ends this process with status 75. For use before the training handles signals by itself."""
    return handling_stop_signals(_exit)


@contextmanager
def handling_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call ``handler`` for each of ``stop_signals`` within the context."""
    before = {number: signal.signal(number, handler) for number in stop_signals()}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _exit(number: int, frame: FrameType | None) -> None:
    if logs_for_node():
        write_stderr(NOTHING_LOST)
    os._exit(EXIT_STOPPED)
