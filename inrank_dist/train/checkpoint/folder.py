"""A checkpoint's folder: how it comes to be whole, how a reader knows that it is, and which ones are kept.

A checkpoint is ``checkpoints/step-00000100``. It is written as ``tmp-step-00000100``: first its files, each flushed to
the disk; then ``manifest.json`` with the size and the sha256 of every file; then ``complete``, the sha256 of the
manifest; then it gets its name. So a process or a machine may stop at any moment: what has the name, the marker and the
files of its manifest is a whole checkpoint, and everything else is ignored and swept away by the next save. A reader
hashes every file before it uses one.
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
from .listing import Damaged, Unreadable, leftovers, named_folders, step_of, trouble, unlisted

log = logging.getLogger("inrank_dist")

Found = TypeVar("Found")

MANIFEST, MARKER = "manifest.json", "complete"

TENSORS = ".safetensors"
SUFFIXES = (TENSORS, ".json", ".yaml", ".model")
"""What a checkpoint may hold: nothing that is run when it is read."""

FORMAT = 2

HASHERS = 8
"""Files that one process hashes at once; hashlib lets other threads run meanwhile."""


@dataclass(frozen=True)
class FileEntry:
    """Size and sha256 (hex) of a file, as in the manifest."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        ephemeral: whether it removes itself when a newer one is complete.
        files: name -> entry, of every file but the manifest and the marker.
    """

    ephemeral: bool
    files: dict[str, FileEntry]


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Folders of the complete checkpoints of a run, oldest first. Sizes are compared, contents are not hashed.

    Raises:
        Unreadable: they cannot be listed. One that by itself cannot be read is left out, with a warning.
    """
    return [folder for folder, _ in _complete(named_folders(run_folder))]


def _complete(folders: Iterable[Path]) -> Iterator[tuple[Path, Manifest]]:
    """Those that are complete, in their order; each is read when it is asked for."""
    for folder in folders:
        try:
            yield folder, read_manifest(folder)
        except Damaged:
            continue
        except Unreadable as error:
            log.warning("warning: %s", error)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there, of the right size and of the right kind.

    Raises:
        Damaged: it is incomplete, or holds what no checkpoint holds.
        Unreadable: that cannot be told.
    """
    try:
        return _read_manifest(folder)
    except OSError as error:
        raise trouble(folder, error) from None


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
            raise Damaged(f"{path} is {'missing' if found is None else 'no plain file'}")
        if found.st_size != entry.bytes:
            raise Damaged(f"{path} is damaged: it has {found.st_size} bytes and should have {entry.bytes}")
    return manifest


def _parse_manifest(folder: Path, content: bytes) -> Manifest:
    try:
        values = json.loads(content)
        if values["format"] != FORMAT:
            raise Damaged(f"{folder} has format {values['format']}; this version reads format {FORMAT}")
        files = {str(name): FileEntry(**entry) for name, entry in values["files"].items()}
        sound = isinstance(values["ephemeral"], bool) and all(
            isinstance(entry.bytes, int) and isinstance(entry.sha256, str) for entry in files.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{folder / MANIFEST} is no manifest ({error!r})") from None
    if not sound:
        raise Damaged(f"{folder / MANIFEST} is no manifest (a value of the wrong type)")
    for name in files:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or not name.endswith(SUFFIXES):
            raise Damaged(f"{folder / MANIFEST} lists {name!r}, which no checkpoint holds")
    return Manifest(values["ephemeral"], files)


def verify(folder: Path, rank: int = 0, count: int = 1, *, tensors: bool = True) -> None:
    """Hash a checkpoint's files, this process's share of them, and compare with the manifest.

    Args:
        rank, count: process ``rank`` of ``count`` takes every ``count``-th file.
        tensors: whether to hash the files of tensors too, which takes its time.

    Raises:
        Damaged: a file is not as it was written.
        Unreadable: that cannot be told.
    """
    files = read_manifest(folder).files
    entries = [(name, files[name]) for name in sorted(files) if tensors or not name.endswith(TENSORS)][rank::count]
    names = [name for name, _ in entries]
    for (name, expected), found in zip(entries, hash_files(folder, names).values(), strict=True):
        if found != expected:
            raise Damaged(f"{folder / name} is damaged: its sha256 is not the one in {MANIFEST}")


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Entries of files, several at once.

    Raises:
        Damaged, Unreadable: a file cannot be read.
    """

    def entry(name: str) -> FileEntry:
        try:
            return FileEntry((folder / name).stat().st_size, hash_file(folder / name))
        except OSError as error:
            raise trouble(folder / name, error) from None

    names = list(names)
    with ThreadPoolExecutor(HASHERS) as pool:
        return dict(zip(names, pool.map(entry, names), strict=True))


def begin(final: Path) -> Path:
    """Sweep away what interrupted saves and removals left, and make the private folder for a new checkpoint."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in leftovers(final.parent.parent):
        _sweep(left)
    partial = final.with_name(f"tmp-{final.name}")
    partial.mkdir()
    return partial


def seal(folder: Path, contents: Mapping[str, bytes]) -> dict[str, FileEntry]:
    """Write small files and flush them to the disk; their entries."""
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
    """Make a private folder, whose files are sealed, the checkpoint."""
    manifest = {"format": FORMAT, "ephemeral": ephemeral, "files": {name: asdict(e) for name, e in files.items()}}
    sealed = seal(partial, {MANIFEST: as_json(manifest)})
    seal(partial, {MARKER: f"{sealed[MANIFEST].sha256}\n".encode()})
    flush_path(partial)
    try:
        read_manifest(partial)
    except Damaged as error:
        raise Damaged(f"{error} for process 0; write a run.dir on a file system that all processes share") from None
    old = final.with_name(f"tmp-old-{final.name}")
    if status(final, follow_links=False):  # damaged, or without the validation that was still due
        final.rename(old)
    partial.rename(final)
    flush_path(final.parent)
    _sweep(old)


def recover(run_folder: Path) -> None:
    """Give a checkpoint its name back that was killed between giving it up and handing it to its successor.

    Raises:
        Unreadable: whether there is one cannot be told, or it cannot be renamed.
    """
    for old in leftovers(run_folder):
        final = old.with_name(old.name.removeprefix("tmp-old-"))
        try:
            if re.fullmatch(r"tmp-old-step-\d{8,}", old.name) and status(final, follow_links=False) is None:
                old.rename(final)
        except OSError as error:
            raise unlisted(run_folder, error) from None


def retain(run_folder: Path, newest: int, *, keep: int, keep_every: int, settled: set[str] | None = None) -> None:
    """Remove complete checkpoints that are neither among the ``keep`` newest nor of a step that ``keep_every`` divides
    (0: none), and every ephemeral one but the newest of all. What is incomplete is no checkpoint: it neither counts nor
    goes; nor does one of a later step than ``newest``, which was just saved: the run went on from before it because
    its bytes are damaged, and it must not push out a sound one.

    Args:
        settled: names of those that stay for good, as the call before found; the same set from call to call. They are
            not read again once enough newer ones are there, or a save would take time in proportion to the saves
            before it.
    """
    settled = set() if settled is None else settled
    folders = [folder for folder in reversed(named_folders(run_folder)) if step_of(folder) <= newest]
    permanent = 0
    # From the newest on; one that is settled is passed over only behind those that ``keep`` counts.
    candidates = (each for each in folders if permanent < keep or each.name not in settled)
    for newer, (folder, manifest) in enumerate(_complete(candidates)):
        permanent += not manifest.ephemeral
        stays = bool(keep_every) and step_of(folder) % keep_every == 0 and not manifest.ephemeral
        if stays:
            settled.add(folder.name)
        elif newer and (manifest.ephemeral or permanent > keep):
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint: its name goes first, so that none is ever there in part."""
    doomed = folder.with_name(f"tmp-removed-{folder.name}")
    folder.rename(doomed)
    _sweep(doomed)


def _sweep(left: Path) -> None:
    """Remove what is no checkpoint; where that does not succeed it is told and stays, for it is in nobody's way but the
    disk's, and the next save tries again."""
    found = status(left, follow_links=False)
    try:
        if found is None:
            return
        if stat.S_ISDIR(found.st_mode):
            shutil.rmtree(left)
        else:
            left.unlink()
    except FileNotFoundError:  # something else removes it as well
        return
    except OSError as error:
        log.warning("warning: %s could not be removed (%s)", left, error)


def newest_sound(
    run_folder: Path, folders: Iterable[Path], check: Callable[[Path], Found], say: Callable[[str], None]
) -> Found:
    """What ``check`` returned of the newest of ``folders`` that passes it; a loud line for each that does not.

    Raises:
        Damaged: none does; the message is that of the newest.
        Unreadable: whether one does cannot be told.
    """
    first: Damaged | None = None
    for folder in sorted(folders, key=step_of, reverse=True):
        try:
            return check(folder)
        except Damaged as error:
            first = first or error
            say(f"warning: {error}; trying the checkpoint before it")
    raise Damaged(
        f"{first}; {run_folder} holds no checkpoint that can be used: restore one, or write another run.dir"
        if first
        else f"{run_folder} holds no checkpoint; train it first"
    )
