"""Standard output and error that may go away: ``| head`` exits, the terminal is closed, the disk is full.

Commands that produce files continue without them. Commands whose result is their output end as Unix tools do.
"""

import errno
import io
import os
import select
import signal
import sys
import threading
from contextlib import suppress
from typing import Any, NoReturn, TextIO

from .errors import UserError

CLOSED_ERRNOS = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET, errno.ESTALE)
"""The reader is gone for good. A closed terminal gives EIO."""

WRITE_TIMEOUT_SECONDS = 1.0


def guard(*, outlive: bool) -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` by streams to the same files that handle a closed reader or full disk.

    Does nothing if they have already been replaced, for example by a test that captures them.

    Args:
        outlive: whether this process continues without its console (and says so once, if stderr is still open). If
            False, it ends by SIGPIPE.
    """
    _open_standard_descriptors()
    for name in ("stdout", "stderr"):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is None:  # was closed when Python started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # open until the process exits
        elif stream is original and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _guarded(stream, name, outlive))


def write_stderr(line: str) -> None:
    """Write a line to standard error. Never fails, takes no lock and does not block on a paused terminal."""
    with suppress(OSError):
        if select.select([], [2], [], WRITE_TIMEOUT_SECONDS)[1]:
            os.write(2, f"{line}\n".encode())


def flush(seconds: float = 1.0) -> None:
    """Flush standard output and error before ``os._exit``.

    Has a timeout: a paused terminal accepts nothing, and a thread blocked on it holds the stream's lock.
    """

    def work() -> None:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()

    thread = threading.Thread(target=work, name="flush", daemon=True)
    thread.start()
    thread.join(seconds)


def flush_and_exit(status: int) -> NoReturn:
    """Flush and end the process without waiting for daemon threads and without finalizing the interpreter.

    A daemon thread that returns from torch's C++ code during finalization would abort the process.
    """
    flush()
    os._exit(status)


class GuardedFile(io.RawIOBase):
    """A raw stream on a file descriptor that raises at most once: a ``UserError``, if the output is the result.

    Args:
        descriptor: 1 or 2.
        outlive: see ``guard``.
    """

    def __init__(self, descriptor: int, outlive: bool) -> None:
        self._descriptor, self._outlive, self._reported = descriptor, outlive, False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        remaining = memoryview(data).cast("B")
        length = len(remaining)
        while remaining:
            try:
                remaining = remaining[os.write(self._descriptor, remaining) :]
            except BlockingIOError:  # another program has set the shared terminal or pipe to non-blocking
                select.select([], [self._descriptor], [])
            except OSError as error:
                if error.errno in CLOSED_ERRNOS:
                    self._handle_closed(error)
                elif not self._outlive and self._descriptor == 1 and not self._reported:
                    self._reported = True  # flushing the buffer would raise it again
                    raise UserError(
                        f"standard output cannot be written ({error.strerror}); write it to another place"
                    ) from None
                break  # on a full disk, drop this line; there may be room for later ones
        return length

    def _handle_closed(self, error: OSError) -> None:
        if not self._outlive:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGPIPE)
            os._exit(128 + signal.SIGPIPE)  # PID 1 of a container is not killed by its own signals
        # Redirect the descriptor itself, for C++ code and child processes, which SIGPIPE would kill.
        with suppress(OSError):
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self._descriptor)
            os.close(devnull)
        if self._descriptor == 1:
            reason = os.strerror(error.errno or 0)
            write_stderr(f"standard output is closed ({reason}); process {os.getpid()} continues without it")


def _guarded(stream: io.TextIOWrapper, name: str, outlive: bool) -> TextIO:
    with suppress(OSError, ValueError):
        stream.flush()
    raw: Any = GuardedFile(stream.fileno(), outlive)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _open_standard_descriptors() -> None:
    """Open closed standard descriptors (``>&-``), or the next file opened would get number 0, 1 or 2."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
