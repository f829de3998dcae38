"""Standard output and error, which may go away: ``| head`` has seen enough, the terminal is closed, the disk is full.

Work whose product is files goes on without them. A command whose product is what it prints ends as unix tools do.
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

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET, errno.ESTALE)
"""Nobody will ever read there again; EIO is what a closed terminal answers."""

SAY_SECONDS = 1.0


def guard(*, outlive: bool) -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` by streams to the same files that know what to do when these are gone.

    Nothing happens where they have been replaced already, as by a test that captures them.

    Args:
        outlive: whether this process goes on without its console (it says so once, where somebody still reads), or
            ends, by SIGPIPE.
    """
    _open_standard_descriptors()
    for name in ("stdout", "stderr"):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is None:  # it was closed when Python started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # as long as the process
        elif stream is original and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _guarded(stream, name, outlive))


def say(line: str) -> None:
    """A line to standard error, from wherever: it cannot fail, waits for no lock, and not for a paused terminal."""
    with suppress(OSError):
        if select.select([], [2], [], SAY_SECONDS)[1]:
            os.write(2, f"{line}\n".encode())


def flush(seconds: float = 1.0) -> None:
    """Write out what is buffered, before ``os._exit``. Not for ever: a paused terminal takes nothing, and a thread that
    waits for it holds the stream's lock."""

    def work() -> None:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()

    thread = threading.Thread(target=work, name="flush", daemon=True)
    thread.start()
    thread.join(seconds)


def leave(status: int) -> NoReturn:
    """Write out what is buffered and end the process, without waiting for daemon threads or taking Python down.

    A daemon thread that comes back from torch's C++ while Python is taken down aborts the process.
    """
    flush()
    os._exit(status)


class GuardedFile(io.RawIOBase):
    """A file descriptor whose ``write`` fails at most once, with a ``UserError`` where what is lost was the product.

    Args:
        descriptor: 1 or 2.
        outlive: see ``guard``.
    """

    def __init__(self, descriptor: int, outlive: bool) -> None:
        self._descriptor, self._outlive, self._refused = descriptor, outlive, False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        length = len(rest)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # another program has set a shared terminal or pipe to non-blocking
                select.select([], [self._descriptor], [])
            except OSError as error:
                if error.errno in GONE:
                    self._lose(error)
                elif not self._outlive and self._descriptor == 1 and not self._refused:
                    self._refused = True  # what is still buffered would say it again
                    raise UserError(
                        f"standard output cannot be written ({error.strerror}); write it to another place"
                    ) from None
                break  # what does not fit on a full disk is left out; there may be room for later lines
        return length

    def _lose(self, error: OSError) -> None:
        if not self._outlive:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGPIPE)
            os._exit(128 + signal.SIGPIPE)  # a container's first process is not killed by its own signals
        # Also for what writes there without Python, and for child processes, which SIGPIPE would kill.
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._descriptor)
            os.close(nowhere)
        if self._descriptor == 1:
            say(
                f"standard output is closed ({os.strerror(error.errno or 0)}); process {os.getpid()} goes on without it"
            )


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
    """Where 0, 1 or 2 is closed (``>&-``), the next file that is opened would get that number, and what is printed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
