"""Sources of text (standard library, files, Hugging Face hub): detecting changes and reading."""

import errno
import hashlib
import io
import json
import logging
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk

from ..runtime.errors import UserError
from ..runtime.home import expand_home
from ..runtime.progress import phase
from .globs import find_files
from .hashing import Hashed, check_unchanged, hash_files
from .readers import (
    SUFFIXES,
    TYPES,
    MissingText,
    Piece,
    missing_column,
    not_text,
    read_file,
    suffix_of,
    type_of,
    value_in,
    whole_document,
)
from .settings import DataSettings
from .stored import Documents, store

log = logging.getLogger("inrank_dist.progress")

#: Errors of a full or failing disk.
DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}

#: Folders of the standard library with tests, installed packages, or files generated when Python was built.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}

#: Rows of a data set to hold in memory at a time.
HUB_ROWS = 64


@dataclass(frozen=True)
class Texts:
    """Text after reading. ``validation`` is None if the source has no validation data. ``names`` are stable names of
    the documents; None if they have no names and are identified by their text."""

    train: Documents
    validation: Documents | None = None
    names: list[str] | None = None


@dataclass(frozen=True)
class Source:
    """Text that has not been read yet. ``identity`` (hex) changes whenever the text may have changed.
    ``read(scratch, progress)`` stores the text in files in the folder ``scratch``."""

    identity: str
    read: Callable[[Path, bool], Texts]


def open_source(data: DataSettings, *, remember: bool = True) -> Source:
    """Find the text that ``data`` names. For ``remember`` see ``hash_files``.

    Raises:
        UserError: files or folders are missing, of an unsupported type, empty, or not UTF-8. Errors that only show when
            reading (columns, splits, corrupt files) are raised by ``read``.
    """
    if data.source == "stdlib":
        return _open_stdlib()
    if data.source == "files":
        return _open_files(data, remember)
    return _open_hub(data, remember)


def _open_stdlib() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    texts = {}
    for folder, subfolders, files in os.walk(root):
        # config-* folders and _sysconfigdata* contain build paths, which differ between machines.
        subfolders[:] = [name for name in subfolders if name not in NOT_LIBRARY and not name.startswith("config-")]
        for name in files:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                text = _python_source(path.read_bytes())
                if text:
                    texts[path.relative_to(root).as_posix()] = text
    if not texts:
        raise UserError("data.source is stdlib, but this Python has no library sources; write data.source: files")
    texts = dict(sorted(texts.items()))
    identity = hashlib.sha256()
    for name, text in texts.items():
        identity.update(f"{name}\0{len(text)}\0{text}".encode())

    def read(scratch: Path, progress: bool) -> Texts:
        pieces = (Piece(text, True) for text in texts.values())
        return Texts(_store("training", pieces, scratch, progress), names=list(texts))

    return Source(identity.hexdigest(), read)


def _python_source(content: bytes) -> str | None:
    """The text of a Python file in UTF-8; None if it uses another encoding."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return content.decode(encoding) if encoding in ("utf-8", "utf-8-sig") else None
    except (SyntaxError, UnicodeDecodeError):
        return None


def _open_files(data: DataSettings, remember: bool) -> Source:
    train = find_files("paths", data.paths, SUFFIXES)
    validation = find_files("validation_paths", data.validation_paths, SUFFIXES)
    real = {os.path.realpath(path): path for path in train}
    for path in validation:
        if same := real.get(os.path.realpath(path)):
            also = f" (as {same})" if same != path else ""
            raise UserError(
                f"data.paths and data.validation_paths both match {path}{also}; write globs with no file in common"
            )
    cache_dir = expand_home(data.cache_dir, "data.cache_dir")
    files = [*train, *validation]
    hashes = hash_files(files, cache_dir, is_text=lambda path: path.suffix in (".txt", ".jsonl"), remember=remember)
    identity = json.dumps(
        [[[suffix_of(path), hashes[path].sha256] for path in part] for part in (train, validation)] + [data.text_column]
    )

    def read(scratch: Path, progress: bool) -> Texts:
        texts = Texts(
            _store("training", _read_files(train, data), scratch, progress),
            _store("validation", _read_files(validation, data), scratch, progress) if validation else None,
        )
        check_unchanged(hashes)
        return texts

    return Source(hashlib.sha256(identity.encode()).hexdigest(), read)


def _read_files(paths: list[Path], data: DataSettings) -> Iterator[Piece]:
    """Read all .txt files, then .jsonl, then .parquet, compressed or not, each in the order of ``paths``. Logs files
    without text."""
    for path in sorted(paths, key=lambda path: TYPES.index(type_of(path))):
        empty = True
        if path.stat().st_size:
            for piece in read_file(path, text_column=data.text_column, document_separator=data.document_separator):
                empty = empty and not piece.text
                yield piece
        if empty:
            log.info("%s holds no text and is skipped", path)


def _open_hub(data: DataSettings, remember: bool) -> Source:
    assert data.name is not None
    what: dict[str, Any] = {
        "name": data.name,
        "config": data.config,
        "splits": [data.train_split, data.validation_split],
        "text_column": data.text_column,
    }
    folder = _local_folder(data.name)
    hashes: dict[Path, Hashed] = {}
    if folder is not None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        hashes = hash_files(files, expand_home(data.cache_dir, "data.cache_dir"), remember=remember)
        what["name"] = [[path.relative_to(folder).as_posix(), hashes[path].sha256] for path in files]

    def read(scratch: Path, progress: bool) -> Texts:
        # Do not read a local folder through the hub's cache, which misses changes that keep the modification time.
        location = {"path": data.name} if folder is None else {"path": str(folder), "cache_dir": str(scratch / "hub")}

        def split(title: str, key: str, name: str) -> Documents:
            if folder is not None and _is_saved(folder):
                rows = _saved_split(folder, name, key)
            else:
                rows = _load(
                    f"data.name is {data.name!r}, whose split {name!r} cannot be read",
                    f"check data.name, data.config and data.{key}",
                    **location,
                    name=data.config,
                    split=name,
                )
            where = f"split {name!r} of {data.name}"
            return _store(title, _read_rows(rows, data.text_column, where), scratch, progress)

        train = split("training", "train_split", data.train_split)
        validation = None
        if data.validation_split is not None:
            validation = split("validation", "validation_split", data.validation_split)
        check_unchanged(hashes)
        return Texts(train, validation)

    return Source(hashlib.sha256(json.dumps(what).encode()).hexdigest(), read)


def _local_folder(name: str) -> Path | None:
    """The folder that ``data.name`` refers to; None if it is a name on the hub."""
    folder = Path(name) if os.path.isdir(name) else expand_home(name, "data.name")
    if not folder.is_dir():
        return None
    real = os.path.realpath(folder)
    if "::" in real or any(character in real for character in "*?[]"):
        raise UserError(
            f"data.name is {name!r}, and `datasets` takes the name of that folder ({real}) for a pattern; rename it, "
            "or write data.source: files with data.paths"
        )
    return folder


def _load(problem: str, advice: str, *args: Any, **options: Any) -> Dataset:
    """Call ``datasets.load_dataset`` and report its many kinds of failure (network, format, disk) in one line."""
    try:
        return load_dataset(*args, **options)
    except Exception as error:
        chained: BaseException | None = error
        while chained is not None:
            if not isinstance(chained, Exception):  # an interrupt, which then caused another error
                raise chained from None
            chained = chained.__cause__ or chained.__context__
        cause: BaseException = error
        while cause.__cause__ is not None:  # datasets raises "An error occurred" and chains the reason
            cause = cause.__cause__
        if isinstance(cause, OSError) and cause.errno in DISK_ERRNOS and "cache_dir" in options:
            raise cause from error  # the disk of our scratch folder failed, not the data
        reason = " ".join(str(cause).split())[:300].rstrip(".") or type(cause).__name__
        raise UserError(f"{problem}: {reason}; {advice}") from error


def _is_saved(folder: Path) -> bool:
    """Whether a folder was written by ``datasets.save_to_disk``."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved_split(folder: Path, name: str, key: str) -> Dataset:
    """A split of a folder that ``datasets.save_to_disk`` wrote. A folder with a single data set has the split train."""
    try:
        saved = load_from_disk(str(folder))
    except Exception as error:  # of the library, Arrow or the disk
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise UserError(f"data.name is {str(folder)!r}, which cannot be read: {reason}; save it again") from error
    splits = {"train": saved} if isinstance(saved, Dataset) else dict(saved)
    if name not in splits:
        raise UserError(
            f"data.{key} is {name!r}, and {folder} has the splits {', '.join(splits)}; write one of them"
            + (", or null to hold out part of the training text" if key == "validation_split" else "")
        )
    return splits[name]


def _read_rows(rows: Dataset, column: str, where: str) -> Iterator[Piece]:
    top, *fields = [column] if column in rows.column_names else column.split(".")
    if top not in rows.column_names:
        raise missing_column(column, where, rows.column_names)
    feature = rows.features[top]
    for name in fields:
        if not isinstance(feature, Mapping) or name not in feature:
            raise missing_column(column, where, rows.column_names)
        feature = feature[name]
    kind = getattr(feature, "dtype", "a nested type")
    if kind not in ("string", "large_string", "string_view", "null"):
        raise not_text(column, where, kind)
    missing = MissingText(where, column, "row")
    number = 0
    for batch in rows.select_columns([top]).iter(HUB_ROWS):
        for value in batch[top]:
            text = value_in({top: value}, column)
            number += 1
            if text is None:
                missing.add(number, [column])
            else:
                missing.rows += 1
                yield whole_document(text, f"row {number} of {where}")
    missing.report()


def _store(title: str, pieces: Iterator[Piece], scratch: Path, progress: bool) -> Documents:
    with phase(f"reading the {title} text", unit="bytes", enabled=progress, patience=0) as advance:
        return store(pieces, scratch / f"{title}.utf8", advance)
