"""A folder made once, by one process, whole or not at all, however many processes ask for it."""

import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from inrank_dist.errors import UserError

logger = logging.getLogger("inrank_dist")

#: After this many seconds a private folder of another machine, whose processes cannot be looked up, is
#: litter.
ABANDONED_AFTER_S = 2 * 24 * 3600


def make_once(final: Path, build: Callable[[Path], None]) -> None:
    """Make the folder ``final`` by ``build(work)``, unless it exists; one process builds, others wait.

    ``build`` fills a private folder beside ``final``, which is flushed to disk and renamed. The rename is
    what makes this correct: it is atomic and fails when another process was first, and then that one's folder
    stands. The lock only saves work, so a file system without locks costs time and nothing else.

    Raises:
        UserError: ``build`` raised one, or the disk failed. Processes that were waiting meanwhile raise the
            same.
    """
    if final.is_dir():
        return
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        failure = final.parent / f".{final.name}.failed"
        failure_before = _read(failure)
        with _lock(final.parent / f".{final.name}.lock"):
            if final.is_dir():
                return
            failure_now = _read(failure)
            if failure_now is not None and failure_now != failure_before:
                raise UserError(json.loads(failure_now)["error"])
            _remove_litter(final.parent)
            try:
                _build_and_rename(final, build)
            except UserError as error:
                # The identifier tells waiting processes that this failure is newer than their start.
                write_atomically(failure, json.dumps({"id": uuid.uuid4().hex, "error": str(error)}).encode())
                raise
            failure.unlink(missing_ok=True)
    except OSError as error:
        raise _disk_trouble(final.parent, error) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or all of the new one."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _build_and_rename(final: Path, build: Callable[[Path], None]) -> None:
    work = final.parent / f".{final.name}.tmp-{os.getpid()}-{uuid.uuid4().hex}-{socket.gethostname()}"
    work.mkdir()
    try:
        try:
            build(work)
            _flush(work)
        except OSError as error:
            raise _disk_trouble(final.parent, error) from error
        try:
            os.rename(work, final)
        except OSError:
            # Where locks do not work another process may have been first; its folder holds the same.
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _disk_trouble(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"data.cache_dir is {folder}, and it cannot be used ({error.strerror or error})"
        " - name a folder that can be written and has room"
    )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            logger.info("another process prepares %s: waiting", path.name.strip(".").removesuffix(".lock"))
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        logger.warning("no lock on %s (%s): processes may prepare the same data twice", path, error)
    try:
        yield
    finally:
        lock.release()


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _remove_litter(parent: Path) -> None:
    """Remove private folders that killed processes left, of any data set; called with the lock held."""
    for folder in parent.glob(".*.tmp-*"):
        pid, _, host = folder.name.rpartition(".tmp-")[2].split("-", 2)
        try:
            left = not _alive(int(pid)) if host == socket.gethostname() else False
            left = left or time.time() - folder.stat().st_mtime > ABANDONED_AFTER_S
        except FileNotFoundError:  # its owner has just renamed or removed it
            continue
        if left:
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush(folder: Path) -> None:
    """Put every file and folder name on the disk, so that a machine that stops cannot leave short files."""
    for path in [folder, *folder.rglob("*")]:
        flush_path(path)


def flush_path(path: Path) -> None:
    """Put a file's content, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
