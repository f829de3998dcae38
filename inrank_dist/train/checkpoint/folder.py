"""The folder of a checkpoint: how it is written atomically, how a reader verifies it, and which ones are kept.

A checkpoint is the folder ``checkpoints/step-00000100``. It is written as ``tmp-step-00000100``: first the files, each
flushed to disk; then ``manifest.json`` with the size and sha256 of every file; then ``complete``, which holds the
sha256 of the manifest; then the folder is renamed. So a process or machine may stop at any time: a folder with the
final name, the marker and all files of its manifest is a complete checkpoint. Everything else is ignored, and deleted
by the next save. Readers hash every file before they use any.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...data.hashing import hash_file
from ...runtime.files import flush_path
from ...runtime.paths import content_of, is_plain_file, status
from ...runtime.progress import Advance, phase
from .listing import Damaged, Unreadable, leftovers, listing_error, named_folders, read_error, step_of

log = logging.getLogger("inrank_dist")

Found = TypeVar("Found")

MANIFEST, MARKER = "manifest.json", "complete"

TENSORS = ".safetensors"
SUFFIXES = (TENSORS, ".json", ".yaml", ".model")
"""File types allowed in a checkpoint. None of them can execute code when it is read."""

FORMAT = 2

HASH_THREADS = 8
"""Files to hash concurrently per process; hashlib releases the GIL."""


@dataclass(frozen=True)
class FileEntry:
    """Size and sha256 (hex) of a file, as in the manifest."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of a checkpoint.

    Attributes:
        ephemeral: whether the checkpoint is removed once a newer one is complete.
        files: name -> entry, for every file except the manifest and the marker.
    """

    ephemeral: bool
    files: dict[str, FileEntry]


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Folders of a run's complete checkpoints, oldest first. Compares file sizes but does not hash the files.

    Raises:
        Unreadable: the folders cannot be listed. A single checkpoint that cannot be read is skipped with a warning.
    """
    return [folder for folder, _ in _complete(named_folders(run_folder))]


def _complete(folders: Iterable[Path]) -> Iterator[tuple[Path, Manifest]]:
    """Those that are complete, in the same order. Lazy: each is read when it is requested."""
    for folder in folders:
        try:
            yield folder, read_manifest(folder)
        except Damaged:
            continue
        except Unreadable as error:
            log.warning("warning: %s", error)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint, and check that all files exist with the right size and type.

    Raises:
        Damaged: the checkpoint is incomplete, or has a file that does not belong to a checkpoint.
        Unreadable: its state cannot be determined.
    """
    try:
        return _read_manifest(folder)
    except OSError as error:
        raise read_error(folder, error) from None


def _read_manifest(folder: Path) -> Manifest:
    if folder.is_symlink():
        raise Damaged(f"{folder} is a link; write the folder itself")
    for name in (MARKER, MANIFEST):
        if not is_plain_file(folder / name):
            raise Damaged(f"{folder} is incomplete: it has no {name}")
    content, marker = (folder / MANIFEST).read_bytes(), (folder / MARKER).read_bytes()
    if marker != f"{hashlib.sha256(content).hexdigest()}\n".encode():
        raise Damaged(f"{folder / MANIFEST} is damaged: its sha256 is not the one in {MARKER}")
    manifest = _parse_manifest(folder, content)
    for path in content_of(folder):
        if path.name not in manifest.files and path.name not in (MANIFEST, MARKER):
            raise Damaged(f"{path} does not belong to the checkpoint; remove it")
    for name, entry in manifest.files.items():
        path = folder / name
        found = status(path, follow_links=False)
        if found is None or not stat.S_ISREG(found.st_mode):
            raise Damaged(f"{path} is {'missing' if found is None else 'not a regular file'}")
        if found.st_size != entry.bytes:
            raise Damaged(f"{path} is damaged: it has {found.st_size} bytes and should have {entry.bytes}")
    return manifest


def _parse_manifest(folder: Path, content: bytes) -> Manifest:
    try:
        values = json.loads(content)
        if values["format"] != FORMAT:
            raise Damaged(f"{folder} has format {values['format']}; this version reads format {FORMAT}")
        files = {str(name): FileEntry(**entry) for name, entry in values["files"].items()}
        valid = isinstance(values["ephemeral"], bool) and all(
            isinstance(entry.bytes, int) and isinstance(entry.sha256, str) for entry in files.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{folder / MANIFEST} is not a manifest ({error!r})") from None
    if not valid:
        raise Damaged(f"{folder / MANIFEST} is not a manifest (a value of the wrong type)")
    for name in files:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or not name.endswith(SUFFIXES):
            raise Damaged(f"{folder / MANIFEST} lists {name!r}, which no checkpoint holds")
    return Manifest(values["ephemeral"], files)


def verify(folder: Path, rank: int = 0, count: int = 1, *, tensors: bool = True) -> None:
    """Hash a checkpoint's files, or this process's share of them, and compare them with the manifest.

    Args:
        rank, count: process ``rank`` of ``count`` hashes every ``count``-th file.
        tensors: whether to also hash the tensor files, which takes time.

    Raises:
        Damaged: a file has changed since it was written.
        Unreadable: a file cannot be read.
    """
    files = read_manifest(folder).files
    entries = [(name, files[name]) for name in sorted(files) if tensors or not name.endswith(TENSORS)][rank::count]
    names, size = [name for name, _ in entries], sum(entry.bytes for _, entry in entries)
    with phase(f"hashing {folder.name}", size, unit="bytes", enabled=rank == 0) as advance:
        hashed = hash_files(folder, names, advance)
    for (name, expected), found in zip(entries, hashed.values(), strict=True):
        if found != expected:
            raise Damaged(f"{folder / name} is damaged: its sha256 is not the one in {MANIFEST}")


def hash_files(folder: Path, names: Iterable[str], advance: Advance = lambda done: None) -> dict[str, FileEntry]:
    """Manifest entries of files, hashed concurrently. Calls ``advance`` with the bytes of each block.

    Raises:
        Damaged, Unreadable: a file cannot be read.
    """

    def entry(name: str) -> FileEntry:
        try:
            return FileEntry((folder / name).stat().st_size, hash_file(folder / name, advance=advance))
        except OSError as error:
            raise read_error(folder / name, error) from None

    names = list(names)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(names, pool.map(entry, names), strict=True))


def begin(final: Path) -> Path:
    """Delete what interrupted saves and removals left behind, and create the private folder for a new checkpoint."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in leftovers(final.parent.parent):
        _delete(left)
    partial = final.with_name(f"tmp-{final.name}")
    partial.mkdir()
    return partial


def seal(folder: Path, contents: Mapping[str, bytes]) -> dict[str, FileEntry]:
    """Write small files and flush them to disk. Returns their manifest entries."""
    for name, content in contents.items():
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    return {name: FileEntry(len(each), hashlib.sha256(each).hexdigest()) for name, each in contents.items()}


def as_json(content: Mapping[str, Any]) -> bytes:
    """The content of a JSON file."""
    return json.dumps(content, indent=1).encode()


def commit(partial: Path, final: Path, files: Mapping[str, FileEntry], *, ephemeral: bool) -> None:
    """Turn a private folder, whose files have been flushed, into the checkpoint."""
    manifest = {"format": FORMAT, "ephemeral": ephemeral, "files": {name: asdict(e) for name, e in files.items()}}
    sealed = seal(partial, {MANIFEST: as_json(manifest)})
    seal(partial, {MARKER: f"{sealed[MANIFEST].sha256}\n".encode()})
    flush_path(partial)
    try:
        read_manifest(partial)
    except Damaged as error:
        raise Damaged(f"{error} for process 0; write a run.dir on a file system that all processes share") from None
    old = final.with_name(f"tmp-old-{final.name}")
    if status(final, follow_links=False):  # damaged, or saved before the evaluation of its step
        final.rename(old)
    partial.rename(final)
    flush_path(final.parent)
    _delete(old)


def recover(run_folder: Path) -> None:
    """Restore the name of a checkpoint if the process was killed while replacing it with a newer version.

    Raises:
        Unreadable: the folder cannot be listed, or the checkpoint cannot be renamed.
    """
    for old in leftovers(run_folder):
        final = old.with_name(old.name.removeprefix("tmp-old-"))
        try:
            if re.fullmatch(r"tmp-old-step-\d{8,}", old.name) and status(final, follow_links=False) is None:
                old.rename(final)
        except OSError as error:
            raise listing_error(run_folder, error) from None


def retain(run_folder: Path, newest: int, *, keep: int, keep_every: int, settled: set[str] | None = None) -> None:
    """Remove complete checkpoints that are neither among the ``keep`` newest nor at a step that ``keep_every`` divides
    (0: none), and all ephemeral ones except the newest checkpoint.

    Incomplete checkpoints are neither counted nor removed. Neither are those of steps after ``newest``, the step that
    was just saved: the run resumed from before them because they are damaged, and they must not displace a valid one.

    Args:
        settled: names of checkpoints that are kept for good, found by earlier calls; pass the same set to every call.
            They are not read again once there are enough newer ones. Otherwise the time of a save would grow with the
            number of earlier saves.
    """
    settled = set() if settled is None else settled
    folders = [folder for folder in reversed(named_folders(run_folder)) if step_of(folder) <= newest]
    permanent = 0
    # From the newest on. Settled ones are skipped only after those that ``keep`` counts.
    candidates = (each for each in folders if permanent < keep or each.name not in settled)
    for newer, (folder, manifest) in enumerate(_complete(candidates)):
        permanent += not manifest.ephemeral
        kept_for_good = bool(keep_every) and step_of(folder) % keep_every == 0 and not manifest.ephemeral
        if kept_for_good:
            settled.add(folder.name)
        elif newer and (manifest.ephemeral or permanent > keep):
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a partial one never has the final name."""
    doomed = folder.with_name(f"tmp-removed-{folder.name}")
    folder.rename(doomed)
    _delete(doomed)


def _delete(left: Path) -> None:
    """Delete something that is not a checkpoint. A failure is logged only: it wastes disk space, and the next save
    tries again."""
    found = status(left, follow_links=False)
    try:
        if found is None:
            return
        if stat.S_ISDIR(found.st_mode):
            shutil.rmtree(left)
        else:
            left.unlink()
    except FileNotFoundError:  # something else has removed it
        return
    except OSError as error:
        log.warning("warning: %s could not be removed (%s)", left, error)


def newest_valid(
    run_folder: Path, folders: Iterable[Path], check: Callable[[Path], Found], warn: Callable[[str], None]
) -> Found:
    """Return the result of ``check`` for the newest of ``folders`` that passes it, with a warning for each that fails.

    Raises:
        Damaged: all fail; has the message of the newest.
        Unreadable: a folder cannot be read.
    """
    first: Damaged | None = None
    for folder in sorted(folders, key=step_of, reverse=True):
        try:
            return check(folder)
        except Damaged as error:
            first = first or error
            warn(f"warning: {error}; trying the checkpoint before it")
    raise Damaged(
        f"{first}; {run_folder} holds no checkpoint that can be used: restore one, or write another run.dir"
        if first
        else f"{run_folder} holds no checkpoint; train it first"
    )
