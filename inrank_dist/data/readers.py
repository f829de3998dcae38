"""Readers for text files, one per file type, which yield text in pieces of bounded size.

Text is kept unchanged, including line ends. Only a byte-order mark at the start of a file (here) or of a document
(where documents are stored) is removed. All files must be UTF-8.
"""

import codecs
import gzip
import io
import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..runtime.errors import UserError

log = logging.getLogger("inrank_dist.progress")

BLOCK_BYTES = 1 << 20

#: Rows of a parquet file to hold in memory at a time.
PARQUET_ROWS = 64

BYTE_ORDER_MARK = "\ufeff"

TYPES = (".txt", ".jsonl", ".parquet")

#: Suffixes of compressed files. Parquet files are compressed inside.
COMPRESSIONS = (".gz", ".zst")

SUFFIXES = (*TYPES, *(f"{kind}{suffix}" for kind in TYPES[:2] for suffix in COMPRESSIONS))


class Piece(NamedTuple):
    """A piece of a document; ``last`` is set on the document's last piece."""

    text: str
    last: bool


def suffix_of(path: Path) -> str:
    """The suffix of a file, with that of its compression: ``.jsonl.gz``."""
    return "".join(path.suffixes[-2:]) if path.suffix in COMPRESSIONS else path.suffix


def type_of(path: Path) -> str:
    """The type of a supported file, one of ``TYPES``."""
    return suffix_of(path).removesuffix(".gz").removesuffix(".zst")


def read_file(path: Path, *, text_column: str, document_separator: str | None) -> Iterator[Piece]:
    """Read the documents of a file: stretches between separators of a ``.txt`` file, or rows of the other types.

    Raises:
        UserError: the file cannot be read, does not match its suffix, or has no text in ``text_column``.
    """
    try:
        if type_of(path) == ".txt":
            yield from _read_text(path, document_separator)
        elif type_of(path) == ".jsonl":
            yield from _read_jsonl(path, text_column)
        else:
            yield from _read_parquet(path, text_column)
    except (OSError, EOFError, zlib.error) as error:  # the last two: a compressed file that is cut or damaged
        reason = (error.strerror if isinstance(error, OSError) else None) or _one_line(error)
        raise UserError(f"{path} cannot be read ({reason}); make it readable or leave it out") from error


def read_blocks(path: Path) -> Iterator[bytes]:
    """The content of a file in blocks, compressed if the file is."""
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file opened for reading, decompressed while it is read."""
    if path.suffix == ".gz":
        with gzip.open(path) as unzipped:
            yield cast(IO[bytes], unzipped)
    elif path.suffix == ".zst":
        with pa.input_stream(str(path), compression="zstd") as stream, io.BufferedReader(stream, BLOCK_BYTES) as file:
            yield file
    else:
        with path.open("rb") as file:
            yield file


def _blocks(path: Path) -> Iterator[bytes]:
    with _opened(path) as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def decode_utf8(blocks: Iterable[bytes], path: Path | str) -> Iterator[str]:
    """Decode blocks to text. A character may span two blocks.

    Raises:
        UserError: the blocks are not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    try:
        for block in blocks:
            pending = len(decoder.getstate()[0])
            yield decoder.decode(block)
            done += len(block)
        pending = len(decoder.getstate()[0])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {done - pending + error.start}); convert it or leave it out"
        ) from error


def _read_text(path: Path, separator: str | None) -> Iterator[Piece]:
    rest = ""
    for text in decode_utf8(_blocks(path), path):
        if separator is None:
            yield Piece(text, False)
            continue
        *whole, rest = (rest + text).split(separator)
        for document in whole:
            yield Piece(document, True)
        # The separator may span two blocks.
        safe = max(len(rest) - len(separator) + 1, 0)
        yield Piece(rest[:safe], False)
        rest = rest[safe:]
    yield Piece(rest, True)


def _read_jsonl(path: Path, column: str) -> Iterator[Piece]:
    missing = MissingText(str(path), column, "line")
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8 (line {number}, byte {error.start} of it); convert it or leave it out"
                ) from error
            if number == 1:
                text = text.removeprefix(BYTE_ORDER_MARK)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else _one_line(error)
                raise UserError(
                    f"{path} cannot be read: line {number} is not JSON ({reason}); fix it or leave it out"
                ) from error
            if not isinstance(row, dict):
                raise UserError(
                    f"{path} cannot be read: line {number} is {_kind(row)} and not an object; "
                    f'write lines such as {{"{column}": "..."}}'
                )
            value = value_in(row, column)
            if value is None:
                missing.add(number, list(row))
                continue
            if not isinstance(value, str):
                raise UserError(
                    f"data.text_column is {column!r}, which is {_kind(value)} in line {number} of {path}; "
                    "write a column of strings"
                )
            missing.rows += 1
            yield whole_document(value, f"line {number} of {path}")
    missing.report()


def _read_parquet(path: Path, column: str) -> Iterator[Piece]:
    missing = MissingText(str(path), column, "row")
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            schema = file.schema_arrow
            column_path = [column] if column in schema.names else column.split(".")
            kind = _nested_type(schema, column_path)
            if kind is None:
                raise missing_column(column, str(path), schema.names)
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            if not (is_string(kind) or pa.types.is_null(kind)):
                raise not_text(column, str(path), kind)
            number = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
                values = batch.column(column_path[0])
                for name in column_path[1:]:
                    values = pc.struct_field(values, name)
                for value in values.to_pylist():
                    number += 1
                    if value is None:
                        missing.add(number, schema.names)
                    else:
                        missing.rows += 1
                        yield whole_document(value, f"row {number} of {path}")
    except UserError:
        raise
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_one_line(error)}; fix it or leave it out") from error
    missing.report()


def _nested_type(schema: pa.Schema, path: list[str]) -> pa.DataType | None:
    """The type of a column, or of a field within a column of structs; None if there is none."""
    if path[0] not in schema.names:
        return None
    kind = schema.field(path[0]).type
    for name in path[1:]:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(kind.get_field_index(name)).type
    return kind


def value_in(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column of a row. ``a.b`` is the field ``b`` of column ``a``, unless a column has that name."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


class MissingText:
    """Collects the rows of a file or split that have no text, to report them once."""

    def __init__(self, where: str, column: str, unit: str) -> None:
        self.where, self.column, self.unit = where, column, unit
        self.rows = 0
        self.absent = 0
        self.first = 0
        self.columns: list[str] = []

    def add(self, number: int, columns: list[str]) -> None:
        if not self.absent:
            self.first, self.columns = number, columns
        self.absent += 1
        if self.column in columns:
            self.columns = columns

    def report(self) -> None:
        if self.absent and not self.rows and self.column not in self.columns:
            raise missing_column(self.column, self.where, self.columns)
        if self.absent:
            log.warning(
                "warning: %s of %s rows of %s have no text in %r and are skipped (first: %s %s)",
                *(f"{self.absent:,}", f"{self.absent + self.rows:,}", self.where, self.column, self.unit, self.first),
            )


def is_string(kind: pa.DataType) -> bool:
    """Whether a column type holds text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def missing_column(column: str, where: str, columns: Iterable[str]) -> UserError:
    """Error for a ``data.text_column`` that does not exist."""
    return UserError(
        f"data.text_column is {column!r}, and {where} has the columns {', '.join(columns)}; write one of them"
    )


def not_text(column: str, where: str, kind: Any) -> UserError:
    """Error for a ``data.text_column`` that does not hold text."""
    return UserError(f"data.text_column is {column!r}, which is {kind} in {where}; write a column of strings")


def whole_document(text: str, where: str) -> Piece:
    """A piece that is a whole document.

    Raises:
        UserError: the text contains a lone surrogate, half of a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds half of a character ({text[error.start]!a}, a lone surrogate); fix it or leave it out"
        ) from error
    return Piece(text, True)


def _kind(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return names.get(type(value), "null")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
