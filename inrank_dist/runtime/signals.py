"""The signals that ask a process to stop, the same for the training and for its launchers."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

from .console import say
from .place import speaks

EXIT_STOPPED = 75
"""Saved and stopped on request: run the same command again (``EX_TEMPFAIL`` of sysexits.h)."""

NOTHING_LOST = "stopped before the training began; nothing is lost, the same command starts it"

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Those of ``STOP_SIGNALS`` that this process answers.

    SIGHUP is not among them where it is ignored: whoever started this process, such as ``nohup``, wants it to outlive
    its terminal.
    """
    return tuple(
        number for number in STOP_SIGNALS if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    )


def leaving_at_once() -> AbstractContextManager[None]:
    """Until the training listens for itself, a request ends this process with status 75: there is nothing to save."""
    return handling_stop_signals(_leave)


@contextmanager
def handling_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call ``handler`` for each of ``stop_signals`` meanwhile."""
    before = {number: signal.signal(number, handler) for number in stop_signals()}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _leave(number: int, frame: FrameType | None) -> None:
    if speaks():
        say(NOTHING_LOST)
    os._exit(EXIT_STOPPED)
