"""Kernels that DeepSpeed compiles at first use: in a folder of our own, under a lock that dies with its holder.

torch's own lock of such a build is an empty file that outlives a process that is killed: whoever comes after it waits
for ever, without a word. And machines share its folder, where a kernel that was built for another CPU crashes.
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
    """From now on torch builds extensions of this process in a folder of our own, below the one it would have used."""
    given = Path(os.environ[FOLDER]) if FOLDER in os.environ else _cache() / "kernels"
    if not given.name.startswith(OUR_PREFIX):  # else by the process that started this one
        os.environ[FOLDER] = str(given / f"{OUR_PREFIX}{_digest_of_machine()}")
    import torch.utils.cpp_extension as builds

    if not hasattr(builds, "FileBaton"):
        raise RuntimeError("this version of torch locks its builds in another way; engine/kernels.py must follow")
    setattr(builds, "FileBaton", Baton)  # noqa: B010  # mypy takes no assignment to a class


class Baton:
    """In the place of ``torch.utils.file_baton.FileBaton``. Who waits then builds as well: what is there is not built
    again, and what a predecessor could not finish is.

    Args:
        lock_file_path: torch's, in the folder of one kernel.
    """

    def __init__(self, lock_file_path: str, *_: Any, **__: Any) -> None:
        self._folder = Path(lock_file_path).parent
        self._lock = Lock(self._folder / LOCK)

    def try_acquire(self) -> bool:
        """Wait for the lock; always true."""
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
        """Nobody has to: ``try_acquire`` did."""

    def release(self) -> None:
        """Give the lock back."""
        (self._folder / BUILDING).unlink(missing_ok=True)
        self._lock.release()

    def _tell(self, held: LockHeld) -> None:
        log.info("waiting for %s, which builds %s", held.owner or "a process", self._folder)

    def _remove_what_was_built(self) -> None:
        """A compiler that was killed may have left half a file."""
        for file in self._folder.iterdir():
            if not file.name.startswith(LOCK) and file.is_file():
                file.unlink(missing_ok=True)


def _cache() -> Path:
    """Below the home folder, or where there is none."""
    try:
        return Path("~/.cache/inrank_dist").expanduser()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"inrank_dist-{os.getuid()}"


def _digest_of_machine() -> str:
    """What a kernel is built for: the CPU with its features, the versions that it links against."""
    facts = [platform.machine(), platform.python_version(), version("torch"), version("deepspeed")]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts += [line for line in lines if line.startswith(("flags", "Features", "model name"))][:2]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
