"""A file lock for processes on any machines, which no dead process or machine can keep and which names its holder.

A lock ``PATH`` is a series of small files ``PATH.1``, ``PATH.2``, ...; the highest belongs to the current holder. A
contender that finds it released, or its holder dead, creates the next one. Exclusive creation works on every file
system, so exactly one contender wins, and no file is removed while it is in use.

How contenders detect that a holder is dead depends on where it runs:

- On this machine, the kernel tells: the holder has an ``flock`` on its file, which ends with the process, however it
  exits. Process IDs are not used, since containers with one host name have separate ones.
- On other machines, or if the file system has no locks, a lease tells: the holder writes a heartbeat into its file, and
  counts as dead once the file has not changed for ``lease_seconds`` of the contender's clock. Locks are not used here:
  some file systems keep them local to a machine, and some servers keep those of a machine that is gone.
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
HEARTBEATS_PER_LEASE = 6
POLL_SECONDS = 0.2

_HEARTBEAT = "{:<20}\n"
_RELEASED = _HEARTBEAT.format("released").encode()


@dataclass(frozen=True)
class Owner:
    """The holder of a lock.

    Attributes:
        host, pid: of the process; inside a container, as seen there.
        since: when it took the lock, in UTC.
        machine: identifies the running kernel, independent of the host name.
        kernel_lock: whether the file system supports ``flock``.
    """

    host: str
    pid: int
    since: str
    machine: str
    kernel_lock: bool

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class LockHeld(RuntimeError):
    """Another process holds the lock; ``owner`` is None if it has not written its identity yet."""

    def __init__(self, path: Path, owner: Owner | None) -> None:
        super().__init__(f"{path} is held by {owner or 'a process that is just starting'}")
        self.owner = owner


class LockLost(RuntimeError):
    """Another process took over the lock, because this one wrote no heartbeat for the length of the lease."""

    def __init__(self, path: Path, owner: Owner | None) -> None:
        super().__init__(f"{path} was taken over by {owner or 'another process'}")
        self.owner = owner


class Lock:
    """A lock between processes of any machines that share a file system.

    Every ``Lock`` object is a separate contender, even within one process. As a context manager it waits for the lock.

    Args:
        path: of the lock; the parent folder must exist.
        lease_seconds: how long a holder on another machine may go without a heartbeat before it counts as dead.
    """

    def __init__(self, path: Path, lease_seconds: float = LEASE_SECONDS) -> None:
        self.path, self.lease_seconds = path, lease_seconds
        self._number = 0
        self._descriptor: int | None = None
        self._heartbeat_offset = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock, as far as it knows; ``check`` verifies it."""
        return self._descriptor is not None

    def acquire(self, wait_seconds: float | None = None, on_wait: Callable[[LockHeld], None] | None = None) -> None:
        """Take the lock.

        Args:
            wait_seconds: how long to wait for a live holder; None: without limit. For a holder on another machine it
                takes up to ``lease_seconds`` to find out whether it is alive, regardless of ``wait_seconds``.
            on_wait: called once for each holder that this contender waits for.

        Raises:
            LockHeld: the holder is alive and did not release the lock in time.
            OSError: the folder cannot be read or written.
        """
        if self.held:
            raise RuntimeError(f"{self.path} is already held by this object")
        deadline = None if wait_seconds is None else time.monotonic() + wait_seconds
        observer, reported = _Observer(), 0
        while True:
            number, content = self._newest()
            try:
                free = number == 0 or _is_free(content) or self._is_dead(number, content, observer)
            except FileNotFoundError:  # a successor has just removed it
                continue
            if free:
                if self._create(number + 1):
                    return
                continue
            held = LockHeld(self.path, _owner(content))
            if observer.alive and deadline is not None and time.monotonic() >= deadline:
                raise held
            if number != reported and on_wait is not None:
                on_wait(held)
            reported = number
            time.sleep(POLL_SECONDS)

    def release(self) -> None:
        """Release the lock; does nothing if it is not held."""
        if self._descriptor is None:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        descriptor, self._descriptor = self._descriptor, None
        _active.discard(self)
        try:
            # Keep the file: a contender that has found this number dead must not be able to create it again.
            os.pwrite(descriptor, _RELEASED, self._heartbeat_offset)
            os.fsync(descriptor)
        except OSError as error:  # not fatal: the protected work is done, and the lease expires by itself
            log.warning("warning: %s could not be released (%s)", self.path, error)
        finally:
            os.close(descriptor)

    def check(self) -> None:
        """Verify that this object still holds the lock.

        Raises:
            LockLost: another process took it over.
            OSError: the folder cannot be read.
        """
        number, content = self._newest()
        if not self.held or number > self._number:
            raise LockLost(self.path, _owner(content))

    def holder(self) -> Owner | None:
        """The holder, without waiting. None if there certainly is none; a holder on another machine may be dead.

        Raises:
            OSError: the folder cannot be read.
        """
        while True:
            number, content = self._newest()
            if number == 0 or _is_free(content):
                return None
            owner = _owner(content)
            try:
                if owner is not None and _is_local(owner) and not self._is_flocked(number):
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
        """Number and content of the highest file; 0 if there is none."""
        while numbers := self._numbers():
            with contextlib.suppress(FileNotFoundError):  # a successor has just removed it
                return numbers[-1], self._file(numbers[-1]).read_bytes()
        return 0, b""

    def _is_dead(self, number: int, content: bytes, observer: "_Observer") -> bool:
        """Whether the holder of an unreleased file is dead."""
        owner = _owner(content)
        if owner is not None and _is_local(owner):
            observer.alive = self._is_flocked(number)
            return not observer.alive
        return observer.unchanged_for(number, content) > self.lease_seconds

    def _is_flocked(self, number: int) -> bool:
        """Whether a process on this machine holds the ``flock`` of a file.

        Raises:
            FileNotFoundError: a successor has removed the file.
        """
        descriptor = os.open(self._file(number), os.O_RDONLY | os.O_CLOEXEC)
        try:
            # A shared lock, so that contenders which probe at the same time do not take each other for the holder.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _create(self, number: int) -> bool:
        """Try to become the holder by creating the file with this number; False if another contender was first."""
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
            # Written only after the flock: a file without an owner is judged by its lease alone.
            line = (json.dumps(asdict(owner)) + "\n").encode()
            os.pwrite(descriptor, line + _HEARTBEAT.format(0).encode(), 0)
            os.fsync(descriptor)
            numbers = self._numbers()
        except BaseException:
            os.close(descriptor)
            file.unlink(missing_ok=True)
            raise
        if numbers[-1] > number:  # this contender was suspended while later holders came and removed older files
            os.close(descriptor)
            file.unlink(missing_ok=True)
            return False
        for old in numbers:
            if old < number:
                with contextlib.suppress(OSError):  # another user's file in a sticky folder; it is only a few bytes
                    self._file(old).unlink()
        self._number, self._descriptor, self._heartbeat_offset = number, descriptor, len(line)
        _active.add(self)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, args=(self._stop,), name="lock heartbeat", daemon=True)
        self._thread.start()
        return True

    def _heartbeat(self, stop: threading.Event) -> None:
        count, warned = 0, False
        while not stop.wait(self.lease_seconds / HEARTBEATS_PER_LEASE):
            count += 1
            try:
                assert self._descriptor is not None
                os.pwrite(self._descriptor, _HEARTBEAT.format(count).encode(), self._heartbeat_offset)
                os.fsync(self._descriptor)  # on a network file system, this sends it to the server
            except OSError as error:
                if not warned:
                    log.warning("warning: no heartbeat into %s (%s); another job may take it", self.path, error)
                warned = True

    def _drop(self) -> None:
        """Drop the parent's lock in a forked child. Closing the copy does not release the parent's ``flock``."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _Observer:
    """What a contender has observed of a holder on another machine."""

    def __init__(self) -> None:
        self.alive = False
        self._seen: tuple[int, bytes] | None = None
        self._since = 0.0

    def unchanged_for(self, number: int, content: bytes) -> float:
        """Seconds for which file and content have not changed. A change shows that the holder is alive."""
        if (number, content) != self._seen:
            self.alive = self._seen is not None
            self._seen, self._since = (number, content), time.monotonic()
        return time.monotonic() - self._since


_active: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _drop_all() -> None:
    for lock in list(_active):
        lock._drop()
    _active.clear()


os.register_at_fork(after_in_child=_drop_all)


def _flock(descriptor: int) -> bool:
    """``flock`` a file that this process has just created; False if the file system does not support it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # the errno differs between file systems; the lease is used instead
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


def _is_local(owner: Owner) -> bool:
    """Whether this machine's kernel can tell if a holder is alive."""
    return owner.kernel_lock and owner.machine == _machine()


def _machine() -> str:
    """Identifier of the running kernel: the same in all containers of a machine, different after a reboot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
