"""metrics.jsonl: one JSON object per line, written in whole lines and readable at any time."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from ...runtime.errors import UserError

PERMANENT_KINDS = ("start", "resume")
"""Records that are kept when a resumed run truncates the file, as the history of the run."""


class JsonlMonitor:
    """Appends every record to ``path`` as one line, in one write.

    A partial line left by a killed run is removed before the first record is appended. Numbers that are not finite are
    written as null, because JSON cannot represent them.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _repair_last_line(self.path)
        self._file = self.path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append ``record``. It is in the file when this returns."""
        line = memoryview(json.dumps(_to_json(record), allow_nan=False).encode() + b"\n")
        while line:
            line = line[self._file.write(line) :]

    def truncate_after(self, step: int, *, evaluation_due: bool = False) -> None:
        """Drop the records of steps after ``step``, so that a run resumed there has one value per step. If
        ``evaluation_due``, also drop the evaluation records of ``step`` itself, which will be written again.

        Start and resume records are kept. The file is replaced atomically, so a reader sees either version.
        """
        lines = self.path.read_bytes().splitlines(keepends=True)
        records = _parse_lines(lines, self.path)
        kept = [line for line, record in zip(lines, records, strict=True) if _is_kept(record, step, evaluation_due)]
        if len(kept) == len(lines):
            return
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(b"".join(kept))
            file.flush()
            os.fsync(file.fileno())
        self._file.close()
        temporary.replace(self.path)
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics file, in order. A partial line at the end, as left by a killed run, is ignored.

    Raises:
        UserError: the file does not exist, or a line before the last is not a JSON object.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; write the folder of a run that has started") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); make it readable") from None
    if lines and not lines[-1].endswith(b"\n") and _parse(lines[-1]) is None:
        lines.pop()
    return _parse_lines(lines, path)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: includes invalid UTF-8
        return None
    return record if isinstance(record, dict) else None


def _parse_lines(lines: list[bytes], path: Path) -> list[dict[str, Any]]:
    records = []
    for index, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None:
            raise UserError(f"{path} line {index} is not a JSON object; delete that line")
        records.append(record)
    return records


def _is_kept(record: dict[str, Any], last_step: int, evaluation_due: bool) -> bool:
    step = record.get("step")
    if evaluation_due and step == last_step and record.get("kind") in ("eval", "sample", "summary"):
        return False
    return record.get("kind") in PERMANENT_KINDS or not isinstance(step, int) or step <= last_step


def _repair_last_line(path: Path) -> None:
    """Remove a partial record at the end; if only its newline is missing, add it."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        start = content.rfind(b"\n") + 1
        if start == len(content):
            return
        if _parse(content[start:]) is None:
            file.truncate(start)
        else:
            file.write(b"\n")


def _to_json(value: Any) -> Any:
    """Convert to JSON types: unpack array scalars, replace non-finite numbers by None and other types by text."""
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return _to_json(value.item()) if hasattr(value, "item") else str(value)
