"""Creates a folder atomically and only once, however many processes ask for it."""

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

from .environment import logs_for_node
from .errors import UserError
from .lock import Lock, LockHeld, LockLost
from .progress import LINE_INTERVAL_S, phase

logger = logging.getLogger("inrank_dist")

#: In every folder that is made here; contains its name.
MARKER = "folder.json"

PRIVATE = re.compile(r"\.(?P<name>.+)\.tmp-[0-9a-f]{32}")


def make_once(target: Path, build: Callable[[Path], None], check: Callable[[Path], None] = lambda folder: None) -> None:
    """Create the folder ``target`` with ``build(work)`` unless it exists. One process builds, the others wait.

    ``build`` fills a private folder beside ``target``, which is flushed to disk, verified by ``check`` and renamed. The
    rename makes this correct: it is atomic and fails if another process was first, in which case that process's folder
    is kept. The lock only avoids duplicate work and shows which private folders are abandoned. The next builder removes
    those.

    Raises:
        UserError: ``build`` raised it, or the disk failed. Processes that were waiting meanwhile raise the same error.
    """
    while True:
        lock = Lock(_lock_path(target))
        try:
            if target.is_dir():
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            failure = target.parent / f".{target.name}.failed"
            failure_before = _read(failure)
            activity = f"waiting for {target}"
            with phase(activity, enabled=logs_for_node(), patience=LINE_INTERVAL_S, bar=False):
                lock.acquire(on_wait=lambda held: _log_waiting(target, held))
            try:
                if target.is_dir():
                    return
                failure_now = _read(failure)
                if failure_now is not None and failure_now != failure_before:
                    raise UserError(str(failure_now["error"]))
                _remove_abandoned(target)
                try:
                    _build_and_rename(target, build, check)
                except (UserError, OSError) as error:
                    lock.check()
                    if isinstance(error, UserError):
                        # A fresh identifier tells waiting processes that the failure happened after they started.
                        reason = json.dumps({"id": uuid.uuid4().hex, "error": str(error)})
                        with contextlib.suppress(OSError):  # this process reports the error in any case
                            write_atomically(failure, reason.encode())
                    raise
                with contextlib.suppress(OSError):  # owned by another user, in a sticky folder
                    failure.unlink(missing_ok=True)
                return
            except LockLost as lost:  # the private folder is gone too: another process builds the folder now
                logger.info("%s", lost)
            finally:
                lock.release()
        except OSError as error:
            raise _disk_error(target.parent, error) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers see either the old content or all of the new content."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _build_and_rename(target: Path, build: Callable[[Path], None], check: Callable[[Path], None]) -> None:
    work = target.parent / f".{target.name}.tmp-{uuid.uuid4().hex}"
    work.mkdir()
    try:
        try:
            (work / MARKER).write_text(json.dumps({"made_by": "inrank_dist", "name": target.name}))
            build(work)
            _flush(work)
            check(work)
        except OSError as error:
            raise _disk_error(target.parent, error) from error
        try:
            os.rename(work, target)
        except OSError:
            # A process that lost the lock may still have been first; its folder has the same content.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _disk_error(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"data.cache_dir is {folder}, and it cannot be used ({error.strerror or error})"
        "; write a folder that can be written and has room"
    )


def _lock_path(target: Path) -> Path:
    return target.parent / f".{target.name}.lock"


def _log_waiting(target: Path, held: LockHeld) -> None:
    owner = held.owner or "another process"
    logger.info("the same data is being prepared by %s: waiting for it, to use it too (%s)", owner, target.name)


def _read(path: Path) -> dict[str, Any] | None:
    """Read a recorded failure; None if there is no such file, or it has other content."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) and "error" in content else None


def _remove_abandoned(target: Path) -> None:
    """Remove private folders of processes that were killed. Call with the lock of ``target`` held.

    A private folder is in use only while the lock of its target is held. It is recognized by its marker file.
    """
    for folder in list(target.parent.glob(".*.tmp-*")):
        found = PRIVATE.fullmatch(folder.name)
        if not found or folder.is_symlink() or not _is_private(folder, found["name"]):
            continue
        other = target.parent / found["name"]
        with contextlib.suppress(OSError):
            # Safe because the folder was listed before the lock is examined: a later holder creates a new folder.
            if other == target or Lock(_lock_path(other)).holder() is None:
                shutil.rmtree(folder, ignore_errors=True)


def _is_private(folder: Path, name: str) -> bool:
    """Whether this module created the folder for the target ``name``."""
    try:
        return json.loads((folder / MARKER).read_text()) == {"made_by": "inrank_dist", "name": name}
    except (OSError, ValueError):
        return False


def _flush(folder: Path) -> None:
    """Flush every file and folder to disk, so that a crash of the machine cannot leave truncated files."""
    for path in [folder, *folder.rglob("*")]:
        flush_path(path)


def flush_path(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
