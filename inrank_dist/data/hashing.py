"""Hashes of files, with a cache, so that a large corpus is not read again at every start."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..runtime.environment import logs_for_node
from ..runtime.errors import UserError
from ..runtime.files import write_atomically
from ..runtime.progress import Advance, phase
from .readers import decode_utf8, read_blocks

#: Files of at least this size are not hashed again while their inode, size and times are unchanged.
REMEMBER_FROM_BYTES = 16 << 20

#: A file that was changed less than this long before it was hashed could change again within the clock's resolution.
CLOCK_RESOLUTION_S = 2.0


class Hashed(NamedTuple):
    """A file's sha256 (hex), and its stat data when the hash was taken."""

    sha256: str
    stamp: list[int]


def _stamp(path: Path) -> list[int]:
    """Stat data that changes with the file's content. Programs cannot set the change time back."""
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def check_unchanged(hashes: dict[Path, Hashed]) -> None:
    """Check that no file has changed since it was hashed. Its text would be stored under the wrong hash.

    Raises:
        UserError: a file has changed.
    """
    for path, (_, stamp) in hashes.items():
        if not path.exists() or _stamp(path) != stamp:
            raise UserError(f"{path} changed while it was read; start again when nothing writes to it")


def hash_files(
    paths: list[Path], cache_dir: Path, is_text: Callable[[Path], bool] = lambda path: False, *, remember: bool = True
) -> dict[Path, Hashed]:
    """sha256 of each file's content. Hashes of large files are cached in ``cache_dir``, if it is writable and
    ``remember`` is set.

    Raises:
        UserError: a file cannot be read, or is a text file by ``is_text`` and not UTF-8.
    """
    cache = cache_dir / "hashes.json"
    known = _read_cache(cache)
    hashes, changed = {}, False
    # Every process of a job does this.
    with phase("hashing the text", _total_size(paths), unit="bytes", enabled=logs_for_node()) as advance:
        for path in paths:
            text = is_text(path)
            key = f"{'text' if text else 'file'} {path.absolute()}"
            try:
                stamp = _stamp(path)
                if key in known and known[key][0] == stamp:
                    hashes[path] = Hashed(known[key][1], stamp)
                    advance(stamp[1])
                    continue
                hashes[path] = Hashed(hash_file(path, must_be_utf8=text, advance=advance), stamp)
            except OSError as error:
                raise UserError(
                    f"{path} cannot be read ({error.strerror}); make it readable or leave it out"
                ) from error
            settled = time.time() - max(stamp[2:]) / 1e9 > CLOCK_RESOLUTION_S
            if stamp[1] >= REMEMBER_FROM_BYTES and settled and stamp == _stamp(path):
                known[key] = [stamp, hashes[path].sha256]
                changed = True
    if changed and remember:
        known = {key: entry for key, entry in known.items() if Path(key.partition(" ")[2]).exists()}
        with contextlib.suppress(OSError):  # an unwritable folder is reported where it matters
            cache_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, json.dumps(known).encode())
    return hashes


def _total_size(paths: list[Path]) -> int:
    """Bytes of the files that exist."""
    size = 0
    for path in paths:
        with contextlib.suppress(OSError):  # reported where it is read
            size += path.stat().st_size
    return size


def _read_cache(cache: Path) -> dict[str, Any]:
    """Path -> stamp, sha256. Empty if the cache is missing or invalid, since it only saves time."""
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: entry for key, entry in known.items() if isinstance(entry, list) and len(entry) == 2}


def hash_file(path: Path, *, must_be_utf8: bool = False, advance: Advance = lambda done: None) -> str:
    """sha256 (hex) of a file's content. Calls ``advance`` with the bytes of each block.

    Raises:
        OSError: the file cannot be read.
        UserError: ``must_be_utf8`` is set and the file is not UTF-8.
    """
    digest = hashlib.sha256()

    def blocks() -> Iterator[bytes]:
        for block in read_blocks(path):
            digest.update(block)
            advance(len(block))
            yield block

    for _ in decode_utf8(blocks(), path) if must_be_utf8 else blocks():
        pass
    return digest.hexdigest()
