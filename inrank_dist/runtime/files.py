"""A folder made once, by one process, whole or not at all, however many processes ask for it."""

import contextlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UserError
from .lock import Lock, LockHeld, LockLost

logger = logging.getLogger("inrank_dist")

#: In every folder that is made here: says that it is one, and of what name.
MARKER = "folder.json"

PRIVATE = re.compile(r"\.(?P<name>.+)\.tmp-[0-9a-f]{32}")


def make_once(final: Path, build: Callable[[Path], None], check: Callable[[Path], None] = lambda folder: None) -> None:
    """Make the folder ``final`` by ``build(work)``, unless it exists; one process builds, others wait.

    ``build`` fills a private folder beside ``final``, which is flushed to disk, looked at by ``check`` and renamed. The
    rename is what makes this correct: it is atomic and fails when another process was first, and then that one's folder
    stands. The lock saves work, and tells which private folders nobody works in any more: those of a process that has
    died are removed by whoever builds next.

    Raises:
        UserError: ``build`` raised one, or the disk failed. Processes that were waiting meanwhile raise the
            same.
    """
    while True:
        lock = Lock(_lock_path(final))
        try:
            if final.is_dir():
                return
            final.parent.mkdir(parents=True, exist_ok=True)
            failure = final.parent / f".{final.name}.failed"
            failure_before = _read(failure)
            lock.acquire(on_wait=lambda held: _tell_waiting(final, held))
            try:
                if final.is_dir():
                    return
                failure_now = _read(failure)
                if failure_now is not None and failure_now != failure_before:
                    raise UserError(str(failure_now["error"]))
                _remove_abandoned(final)
                try:
                    _build_and_rename(final, build, check)
                except (UserError, OSError) as error:
                    lock.check()
                    if isinstance(error, UserError):
                        # The identifier tells waiting processes that this failure is newer than their start.
                        reason = json.dumps({"id": uuid.uuid4().hex, "error": str(error)})
                        with contextlib.suppress(OSError):  # what went wrong is told all the same
                            write_atomically(failure, reason.encode())
                    raise
                with contextlib.suppress(OSError):  # another user's, in a sticky folder
                    failure.unlink(missing_ok=True)
                return
            except LockLost as lost:  # and with it the private folder: another process makes the data set now
                logger.info("%s", lost)
            finally:
                lock.release()
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


def _build_and_rename(final: Path, build: Callable[[Path], None], check: Callable[[Path], None]) -> None:
    work = final.parent / f".{final.name}.tmp-{uuid.uuid4().hex}"
    work.mkdir()
    try:
        try:
            (work / MARKER).write_text(json.dumps({"made_by": "inrank_dist", "name": final.name}))
            build(work)
            _flush(work)
            check(work)
        except OSError as error:
            raise _disk_trouble(final.parent, error) from error
        try:
            os.rename(work, final)
        except OSError:
            # One that lost the lock may have been first nevertheless; its folder holds the same.
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _disk_trouble(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"data.cache_dir is {folder}, and it cannot be used ({error.strerror or error})"
        "; name a folder that can be written and has room"
    )


def _lock_path(final: Path) -> Path:
    return final.parent / f".{final.name}.lock"


def _tell_waiting(final: Path, held: LockHeld) -> None:
    logger.info("%s is being prepared by %s: waiting", final.name, held.owner or "another process")


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file, or it holds something else."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) and "error" in content else None


def _remove_abandoned(final: Path) -> None:
    """Remove private folders that killed processes left; called with the lock of ``final`` held.

    A private folder is worked in only under the lock of its data set, and is known by what is in it.
    """
    for folder in list(final.parent.glob(".*.tmp-*")):
        found = PRIVATE.fullmatch(folder.name)
        if not found or folder.is_symlink() or not _is_private(folder, found["name"]):
            continue
        other = final.parent / found["name"]
        with contextlib.suppress(OSError):
            # Only after the folder was seen: a holder that comes later works in a new one.
            if other == final or Lock(_lock_path(other)).holder() is None:
                shutil.rmtree(folder, ignore_errors=True)


def _is_private(folder: Path, name: str) -> bool:
    """Whether this module made the folder, and for the data set ``name``."""
    try:
        return json.loads((folder / MARKER).read_text()) == {"made_by": "inrank_dist", "name": name}
    except (OSError, ValueError):
        return False


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
