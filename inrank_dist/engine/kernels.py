"""Build folder and build lock of the kernels that DeepSpeed compiles at first use.

The lock of ``torch.utils.cpp_extension`` is an empty file that remains if the process is killed, after which every
other process waits for it forever. Its default folder may be shared by machines with different CPUs, on which the same
kernel can crash. This module replaces both.
"""

import hashlib
import json
import logging
import os
import platform
import socket
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..runtime.lock import Lock, LockHeld

log = logging.getLogger("inrank_dist")

FOLDER = "TORCH_EXTENSIONS_DIR"
OUR_PREFIX = "inrank-"
LOCK, BUILDING = "inrank-lock", "inrank-building"


def use_own_builds() -> None:
    """Make torch build extensions in a folder per machine type, inside the one it would have used."""
    given = Path(os.environ[FOLDER]) if FOLDER in os.environ else _cache() / "kernels"
    if not given.name.startswith(OUR_PREFIX):  # otherwise set by the parent process
        os.environ[FOLDER] = str(given / f"{OUR_PREFIX}{_digest_of_machine()}")
    import torch.utils.cpp_extension as builds

    if not hasattr(builds, "FileBaton"):
        raise RuntimeError("this version of torch locks its builds in another way; engine/kernels.py must follow")
    setattr(builds, "FileBaton", Baton)  # noqa: B010  # mypy takes no assignment to a class


class Baton:
    """Replacement of ``torch.utils.file_baton.FileBaton``.

    A process that had to wait runs the build, too. The build skips what is complete and completes what a killed process
    left unfinished.

    Args:
        lock_file_path: path of torch's lock file, in the folder of one kernel.
    """

    def __init__(self, lock_file_path: str, *_: Any, **__: Any) -> None:
        self._folder = Path(lock_file_path).parent
        self._lock = Lock(self._folder / LOCK)

    def try_acquire(self) -> bool:
        """Wait for the lock and acquire it. Return True."""
        self._lock.acquire(on_wait=self._tell)
        builder = self._folder / BUILDING
        with suppress(FileNotFoundError, ValueError, KeyError):
            left = json.loads(builder.read_text())
            where = f"process {left['pid']} on {left['host']}"
            log.warning("warning: %s was killed while it built %s; building it again", where, self._folder)
            self._remove_what_was_built()
        builder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        return True

    def wait(self) -> None:
        """Return at once, since ``try_acquire`` has waited."""

    def release(self) -> None:
        """Release the lock."""
        (self._folder / BUILDING).unlink(missing_ok=True)
        self._lock.release()

    def _tell(self, held: LockHeld) -> None:
        log.info("waiting for %s, which builds %s", held.owner or "a process", self._folder)

    def _remove_what_was_built(self) -> None:
        """Remove the build's files, because a killed compiler may have left a partial one."""
        for file in self._folder.iterdir():
            if not file.name.startswith(LOCK) and file.is_file():
                file.unlink(missing_ok=True)


def _cache() -> Path:
    """Return the cache folder in the home folder, or in the temporary folder if there is no home folder."""
    try:
        return Path("~/.cache/inrank_dist").expanduser()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"inrank_dist-{os.getuid()}"


def _digest_of_machine() -> str:
    """Return a hash of what a kernel is built for: the CPU and its features, and the versions of its dependencies."""
    facts = [platform.machine(), platform.python_version(), version("torch"), version("deepspeed")]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts += [line for line in lines if line.startswith(("flags", "Features", "model name"))][:2]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
