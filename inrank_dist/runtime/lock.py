"""A lock on a folder that no dead process and no dead machine can hold, and that says who holds it.

A lock ``PATH`` is a row of small files ``PATH.1``, ``PATH.2``, ...: the highest one is the present holder's. Whoever
finds it released, or its holder dead, creates the next one. Creation is exclusive on every file system, so one
contender wins, and no file is taken away from under anybody.

How a holder's death is seen depends on where it runs:

- on this machine by the kernel: a holder has an ``flock`` on its file, which goes with the process, however it ends.
  Process IDs are never asked: containers have their own, under one host name;
- elsewhere, and where the file system has no locks, by a lease: a holder writes a heartbeat into its file, and one that
  has not changed for ``lease_seconds`` by the contender's own clock is dead. Locks are not asked there, since some file
  systems keep them to each machine, and some servers keep those of a machine that is gone.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

log = logging.getLogger("inrank_dist")

LEASE_SECONDS = 60.0
BEATS_PER_LEASE = 6
POLL_SECONDS = 0.2

_BEAT = "{:<20}\n"
_RELEASED = _BEAT.format("released").encode()


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        host, pid: of the process; in a container both are the container's.
        since: when it took the lock, in UTC.
        machine: identifies the running kernel, whatever its host name.
        kernel_lock: whether the file system gave it an ``flock``.
    """

    host: str
    pid: int
    since: str
    machine: str
    kernel_lock: bool

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class LockHeld(RuntimeError):
    """Another process holds the lock; ``owner`` is None where it has not yet written who it is."""

    def __init__(self, path: Path, owner: Owner | None) -> None:
        super().__init__(f"{path} is held by {owner or 'a process that is just starting'}")
        self.owner = owner


class LockLost(RuntimeError):
    """Another process took the lock, since this one had not shown a heartbeat for the length of the lease."""

    def __init__(self, path: Path, owner: Owner | None) -> None:
        super().__init__(f"{path} was taken over by {owner or 'another process'}")
        self.owner = owner


class Lock:
    """A lock between processes of any machines that share a file system.

    Every lock object is a contender of its own, also within a process. It is a context manager that waits.

    Args:
        path: the lock; its folder must exist.
        lease_seconds: how long a holder on another machine may show no heartbeat before it counts as dead.
    """

    def __init__(self, path: Path, lease_seconds: float = LEASE_SECONDS) -> None:
        self.path, self.lease_seconds = path, lease_seconds
        self._number = 0
        self._descriptor: int | None = None
        self._beat_at = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """Whether this object has the lock, as far as it knows; ``check`` looks."""
        return self._descriptor is not None

    def acquire(self, wait_seconds: float | None = None, on_wait: Callable[[LockHeld], None] | None = None) -> None:
        """Take the lock.

        Args:
            wait_seconds: how long to wait for a holder that is alive; None: as long as it takes. Whether one on another
                machine is alive takes up to ``lease_seconds`` to find out, and is found out in any case.
            on_wait: called once for each holder that is waited for.

        Raises:
            LockHeld: the holder is alive and did not release the lock in time.
            OSError: the folder cannot be read or written.
        """
        if self.held:
            raise RuntimeError(f"{self.path} is already held by this object")
        until = None if wait_seconds is None else time.monotonic() + wait_seconds
        watched, told = _Watched(), 0
        while True:
            number, content = self._newest()
            try:
                free = number == 0 or _is_free(content) or self._dead(number, content, watched)
            except FileNotFoundError:  # a successor has just removed it
                continue
            if free:
                if self._create(number + 1):
                    return
                continue
            held = LockHeld(self.path, _owner(content))
            if watched.alive and until is not None and time.monotonic() >= until:
                raise held
            if number != told and on_wait is not None:
                on_wait(held)
            told = number
            time.sleep(POLL_SECONDS)

    def release(self) -> None:
        """Give the lock back; nothing happens where it is not held."""
        if self._descriptor is None:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        descriptor, self._descriptor = self._descriptor, None
        _active.discard(self)
        try:
            # The file stays: a contender that has seen this number dead must not create it again.
            os.pwrite(descriptor, _RELEASED, self._beat_at)
            os.fsync(descriptor)
        except OSError as error:  # the work under the lock is done, and the lease ends by itself
            log.warning("warning: %s could not be released (%s)", self.path, error)
        finally:
            os.close(descriptor)

    def check(self) -> None:
        """Make sure that the lock is still this object's.

        Raises:
            LockLost: another process took it over.
            OSError: the folder cannot be read.
        """
        number, content = self._newest()
        if not self.held or number > self._number:
            raise LockLost(self.path, _owner(content))

    def holder(self) -> Owner | None:
        """Who holds the lock, without waiting; None: certainly nobody. One on another machine may be dead.

        Raises:
            OSError: the folder cannot be read.
        """
        while True:
            number, content = self._newest()
            if number == 0 or _is_free(content):
                return None
            owner = _owner(content)
            try:
                if owner is not None and _is_here(owner) and not self._locked(number):
                    return None
            except FileNotFoundError:  # a successor has just removed it
                continue
            return owner or Owner("an unknown host", 0, "just now", "", False)

    def __enter__(self) -> "Lock":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _file(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _numbers(self) -> list[int]:
        pattern = re.compile(re.escape(self.path.name) + r"\.([1-9][0-9]*)")
        matches = (pattern.fullmatch(name) for name in os.listdir(self.path.parent))
        return sorted(int(match[1]) for match in matches if match)

    def _newest(self) -> tuple[int, bytes]:
        """Number and content of the highest file; 0 where there is none."""
        while numbers := self._numbers():
            with contextlib.suppress(FileNotFoundError):  # its successor has just removed it
                return numbers[-1], self._file(numbers[-1]).read_bytes()
        return 0, b""

    def _dead(self, number: int, content: bytes, watched: "_Watched") -> bool:
        """Whether the holder of a file that is not released is dead."""
        owner = _owner(content)
        if owner is not None and _is_here(owner):
            watched.alive = self._locked(number)
            return not watched.alive
        return watched.unchanged_for(number, content) > self.lease_seconds

    def _locked(self, number: int) -> bool:
        """Whether a process of this machine has the ``flock`` of a file.

        Raises:
            FileNotFoundError: its successor has removed it.
        """
        descriptor = os.open(self._file(number), os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Shared, so that contenders that look at the same time do not take each other for the holder.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _create(self, number: int) -> bool:
        """Become the holder by a file of this number; False where another contender was first."""
        file = self._file(number)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        try:
            owner = Owner(
                host=socket.gethostname(),
                pid=os.getpid(),
                since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
                machine=_machine(),
                kernel_lock=_flock(descriptor),
            )
            # Who it is comes after the flock: a file without an owner is judged by the lease alone.
            line = (json.dumps(asdict(owner)) + "\n").encode()
            os.pwrite(descriptor, line + _BEAT.format(0).encode(), 0)
            os.fsync(descriptor)
            numbers = self._numbers()
        except BaseException:
            os.close(descriptor)
            file.unlink(missing_ok=True)
            raise
        if numbers[-1] > number:  # this contender slept while others came, went and tidied up
            os.close(descriptor)
            file.unlink(missing_ok=True)
            return False
        for old in numbers:
            if old < number:
                with contextlib.suppress(OSError):  # another user's, in a sticky folder: a few bytes stay
                    self._file(old).unlink()
        self._number, self._descriptor, self._beat_at = number, descriptor, len(line)
        _active.add(self)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(self._stop,), name="lock heartbeat", daemon=True)
        self._thread.start()
        return True

    def _beat(self, stop: threading.Event) -> None:
        beats, told = 0, False
        while not stop.wait(self.lease_seconds / BEATS_PER_LEASE):
            beats += 1
            try:
                assert self._descriptor is not None
                os.pwrite(self._descriptor, _BEAT.format(beats).encode(), self._beat_at)
                os.fsync(self._descriptor)  # a network file system sends it to the server now
            except OSError as error:
                if not told:
                    log.warning("warning: no heartbeat into %s (%s); another job may take it", self.path, error)
                told = True

    def _forget(self) -> None:
        """In a forked child, which must not keep its parent's lock: closing releases nothing while the parent lives."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _Watched:
    """What a contender has seen of a holder that it can only watch."""

    def __init__(self) -> None:
        self.alive = False
        self._seen: tuple[int, bytes] | None = None
        self._since = 0.0

    def unchanged_for(self, number: int, content: bytes) -> float:
        """Seconds for which this has been the newest file and its content; a change shows that the holder is alive."""
        if (number, content) != self._seen:
            self.alive = self._seen is not None
            self._seen, self._since = (number, content), time.monotonic()
        return time.monotonic() - self._since


_active: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_active):
        lock._forget()
    _active.clear()


os.register_at_fork(after_in_child=_forget_all)


def _flock(descriptor: int) -> bool:
    """Lock a file that this process has just created; False where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # each file system says in its own way that it has none; the lease stands in
        return False
    return True


def _is_free(content: bytes) -> bool:
    return content.endswith(_RELEASED)


def _owner(content: bytes) -> Owner | None:
    line, newline, _ = content.partition(b"\n")
    if not newline:
        return None
    try:
        return Owner(**json.loads(line))
    except (ValueError, TypeError):
        return None


def _is_here(owner: Owner) -> bool:
    """Whether the kernel of this machine can tell whether a holder lives."""
    return owner.kernel_lock and owner.machine == _machine()


def _machine() -> str:
    """The running kernel: the same in all containers of a machine, another after a restart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
