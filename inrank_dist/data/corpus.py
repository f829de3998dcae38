"""Where text comes from: the standard library, files, the hub; whether it changed; and reading it."""

import errno
import glob
import hashlib
import io
import json
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset

from inrank_dist.data.hashing import Hashed, hash_files, refuse_change
from inrank_dist.data.settings import DataSettings
from inrank_dist.errors import UserError

#: One document a row.
TEXT = Features({"text": Value("string")})

#: Loader of ``datasets`` for each kind of file.
READERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}

#: What a disk that is full or fails answers to a write.
DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}

#: Folders of the standard library's that hold tests, installed packages, or files made when Python was built.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}


@dataclass(frozen=True)
class Documents:
    """Text as it was read. ``validation`` is None where the source has none; ``names`` are the documents'
    stable names where they have any, and the text itself names them where not."""

    train: Dataset
    validation: Dataset | None = None
    names: list[str] | None = None


@dataclass(frozen=True)
class Source:
    """Text that has not been read yet. ``identity`` (hex) changes whenever the text may have;
    ``read(scratch)`` reads it, with ``scratch`` for temporary files that the documents are mapped from."""

    identity: str
    read: Callable[[Path], Documents]


def open_source(data: DataSettings) -> Source:
    """Find the text that ``data`` names.

    Raises:
        UserError: files or folders are missing, of an unknown kind, empty, or not UTF-8. What only reading
            can show (columns, splits, broken files) is raised by ``read``.
    """
    if data.source == "stdlib":
        return _open_stdlib()
    if data.source == "files":
        return _open_files(data)
    return _open_hub(data)


def _open_stdlib() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    texts = {}
    for folder, subfolders, files in os.walk(root):
        # config-* folders and _sysconfigdata* hold build paths, which differ between machines.
        subfolders[:] = [name for name in subfolders if name not in NOT_LIBRARY and not name.startswith("config-")]
        for name in files:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                text = _python_source(path.read_bytes())
                if text:
                    texts[path.relative_to(root).as_posix()] = text
    if not texts:
        raise UserError("data.source is stdlib, but this Python has no library sources - write data.source: files")
    texts = dict(sorted(texts.items()))
    identity = hashlib.sha256()
    for name, text in texts.items():
        identity.update(f"{name}\0{len(text)}\0{text}".encode())
    train = Dataset.from_dict({"text": list(texts.values())}, features=TEXT)
    return Source(identity.hexdigest(), lambda scratch: Documents(train, names=list(texts)))


def _python_source(content: bytes) -> str | None:
    """The text of a Python file in UTF-8, None where it declares or uses another encoding."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return content.decode(encoding) if encoding in ("utf-8", "utf-8-sig") else None
    except (SyntaxError, UnicodeDecodeError):
        return None


def _open_files(data: DataSettings) -> Source:
    train = _expand("paths", data.paths)
    validation = _expand("validation_paths", data.validation_paths)
    both = sorted(set(train) & set(validation))
    if both:
        raise UserError(
            f"data.paths and data.validation_paths both match {both[0]} - write globs with no file in common"
        )
    hashes = hash_files(
        [*train, *validation],
        Path(data.cache_dir).expanduser(),
        is_text=lambda path: path.suffix != ".parquet",
    )
    identity = json.dumps(
        [[[path.suffix, hashes[path].sha256] for path in part] for part in (train, validation)] + [data.text_column]
    )

    def read(scratch: Path) -> Documents:
        documents = Documents(
            _read_files(train, data.text_column, scratch),
            _read_files(validation, data.text_column, scratch) if validation else None,
        )
        refuse_change(hashes)
        return documents

    return Source(hashlib.sha256(identity.encode()).hexdigest(), read)


def _expand(key: str, patterns: Iterable[str]) -> list[Path]:
    """The files that ``patterns`` match, each once, in the order of their names."""
    found = set()
    for pattern in patterns:
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
        files = [Path(match) for match in matches if os.path.isfile(match)]
        if not files and matches:
            raise UserError(f"data.{key} has {pattern!r}, a folder - write {os.path.join(pattern, '**/*.txt')!r}, say")
        if not files:
            missing = "matches no file" if glob.has_magic(pattern) else "does not exist"
            raise UserError(f"data.{key} has {pattern!r}, which {missing} - write the path of a file or a glob")
        found.update(files)
    for path in sorted(found):
        if path.suffix not in READERS:
            raise UserError(
                f"data.{key} matches {path}, which is of no known kind - name only {', '.join(READERS)} files"
            )
    return sorted(found)


def _read_files(paths: list[Path], text_column: str, scratch: Path) -> Dataset:
    """One document a .txt file, one a row of the others; first all .txt, then .jsonl, then .parquet."""
    parts = []
    for suffix, reader in READERS.items():
        files = [str(path) for path in paths if path.suffix == suffix and path.stat().st_size]
        # Tables are read one by one, because their other columns may differ; text files have none.
        for group in [files] if suffix == ".txt" and files else [[file] for file in files]:
            options = {"sample_by": "document"} if suffix == ".txt" else {}
            column = "text" if suffix == ".txt" else text_column
            rows = _load(
                f"{group[0]} cannot be read",
                "mend it or leave it out",
                reader,
                data_files=group,
                split="train",
                cache_dir=str(scratch),
                **options,
            )
            rows = _text_only(rows, column, group[0])
            parts.append(rows if rows.features == TEXT else rows.cast(TEXT))
    return concatenate_datasets(parts) if parts else Dataset.from_dict({"text": []}, features=TEXT)


def _open_hub(data: DataSettings) -> Source:
    assert data.name is not None
    what: dict[str, Any] = {
        "name": data.name,
        "config": data.config,
        "splits": [data.train_split, data.validation_split],
        "text_column": data.text_column,
    }
    folder = Path(data.name).expanduser()
    hashes: dict[Path, Hashed] = {}
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        hashes = hash_files(files, Path(data.cache_dir).expanduser())
        what["name"] = [[path.relative_to(folder).as_posix(), hashes[path].sha256] for path in files]

    def read(scratch: Path) -> Documents:
        # A local folder is not read through the hub's cache, which misses a change that keeps the times.
        place = {"path": str(folder), "cache_dir": str(scratch)} if hashes else {"path": data.name}

        def split(key: str, name: str) -> Dataset:
            rows = _load(
                f"data.name is {data.name!r}, whose split {name!r} cannot be read",
                f"check data.name, data.config and data.{key}",
                **place,
                name=data.config,
                split=name,
            )
            return _text_only(rows, data.text_column, f"split {name!r} of {data.name}")

        train = split("train_split", data.train_split)
        validation = None
        if data.validation_split is not None:
            validation = split("validation_split", data.validation_split)
        refuse_change(hashes)
        return Documents(train, validation)

    return Source(hashlib.sha256(json.dumps(what).encode()).hexdigest(), read)


def _load(problem: str, advice: str, *args: Any, **options: Any) -> Dataset:
    """``datasets.load_dataset``, whose many kinds of failure (network, format, disk) become one line."""
    try:
        return load_dataset(*args, **options)
    except Exception as error:
        behind: BaseException | None = error
        while behind is not None:
            if not isinstance(behind, Exception):  # an interrupt, in whose wake something else went wrong
                raise behind from None
            behind = behind.__cause__ or behind.__context__
        cause: BaseException = error
        while cause.__cause__ is not None:  # datasets says "An error occurred" and chains the reason
            cause = cause.__cause__
        if isinstance(cause, OSError) and cause.errno in DISK_TROUBLE and "cache_dir" in options:
            raise cause from error  # our own scratch folder's, not the data's
        reason = " ".join(str(cause).split())[:300].rstrip(".") or type(cause).__name__
        raise UserError(f"{problem}: {reason} - {advice}") from error


def _text_only(rows: Dataset, column: str, where: str) -> Dataset:
    if column not in rows.column_names:
        raise UserError(
            f"data.text_column is {column!r}, and {where} has the columns {', '.join(rows.column_names)}"
            " - write one of them"
        )
    kind = getattr(rows.features[column], "dtype", "a nested type")
    if kind not in ("string", "large_string"):
        raise UserError(f"data.text_column is {column!r}, which is {kind} in {where} - write a column of strings")
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")
