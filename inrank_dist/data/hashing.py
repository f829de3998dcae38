"""Hashes of files, and a memory of them, so that a big corpus is not read through at every start."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..runtime.errors import UserError
from ..runtime.files import write_atomically
from .readers import decode_utf8, read_blocks

#: Files from this size on are not hashed again while their inode, size and times stand still.
REMEMBER_FROM_BYTES = 16 << 20

#: A file changed less than this long before it was hashed could change once more within the clock's tick.
CLOCK_TICK_S = 2.0


class Hashed(NamedTuple):
    """A file's sha256 (hex), and what the file system showed of the file when it was taken."""

    sha256: str
    stamp: list[int]


def _stamp(path: Path) -> list[int]:
    """What the file system shows of a file's content; the change time cannot be set back by a program."""
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def refuse_change(hashes: dict[Path, Hashed]) -> None:
    """Files that changed after they were hashed would be filed under the hash of their old text."""
    for path, (_, stamp) in hashes.items():
        if not path.exists() or _stamp(path) != stamp:
            raise UserError(f"{path} changed while it was read; start again when nothing writes to it")


def hash_files(
    paths: list[Path], cache_dir: Path, is_text: Callable[[Path], bool] = lambda path: False, *, remember: bool = True
) -> dict[Path, Hashed]:
    """sha256 of each file's content; those of big files are remembered in ``cache_dir``, if it can be
    written, unless ``remember`` is false.

    Raises:
        UserError: a file cannot be read, or ``is_text`` says that it is text and it is not UTF-8.
    """
    memory = cache_dir / "hashes.json"
    known = _read_memory(memory)
    hashes, learned = {}, False
    for path in paths:
        text = is_text(path)
        key = f"{'text' if text else 'file'} {path.absolute()}"
        try:
            stamp = _stamp(path)
            if key in known and known[key][0] == stamp:
                hashes[path] = Hashed(known[key][1], stamp)
                continue
            hashes[path] = Hashed(hash_file(path, must_be_utf8=text), stamp)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); make it readable or leave it out") from error
        settled = time.time() - max(stamp[2:]) / 1e9 > CLOCK_TICK_S
        if stamp[1] >= REMEMBER_FROM_BYTES and settled and stamp == _stamp(path):
            known[key] = [stamp, hashes[path].sha256]
            learned = True
    if learned and remember:
        known = {key: entry for key, entry in known.items() if Path(key.partition(" ")[2]).exists()}
        with contextlib.suppress(OSError):  # a folder that cannot be written is reported where that matters
            cache_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(memory, json.dumps(known).encode())
    return hashes


def _read_memory(memory: Path) -> dict[str, Any]:
    """Path -> stamp, sha256. It only saves time, so one that cannot be read, or holds something else, is none."""
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: entry for key, entry in known.items() if isinstance(entry, list) and len(entry) == 2}


def hash_file(path: Path, *, must_be_utf8: bool = False) -> str:
    """sha256 (hex) of a file's content.

    Raises:
        OSError: it cannot be read.
        UserError: it must be UTF-8 and is not.
    """
    digest = hashlib.sha256()

    def blocks() -> Iterator[bytes]:
        for block in read_blocks(path):
            digest.update(block)
            yield block

    for _ in decode_utf8(blocks(), path) if must_be_utf8 else blocks():
        pass
    return digest.hexdigest()
