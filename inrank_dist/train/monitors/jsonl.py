"""metrics.jsonl: one JSON object a line, whole lines only, readable at any moment."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from ...runtime.errors import UserError

LASTING_KINDS = ("start", "resume")
"""Records that tell the history of the run, kept when its curve is cut back."""


class JsonlMonitor:
    """Appends every record to ``path`` as one line, in one write.

    A half line left by a killed run is cut before the first record is appended. Numbers that are not finite
    become null, because JSON has no word for them.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _mend_last_line(self.path)
        self._file = self.path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append ``record``; it is in the file when this returns."""
        line = memoryview(json.dumps(_plain(record), allow_nan=False).encode() + b"\n")
        while line:
            line = line[self._file.write(line) :]

    def truncate_after(self, step: int, *, evaluation_due: bool = False) -> None:
        """Drop the records of steps later than ``step``, so that a run resumed there has one value a step; also those
        of the end of ``step`` where its validation is still to be done.

        The start and resume lines stay. The file is replaced as a whole: a reader sees the old or the new
        one.
        """
        lines = self.path.read_bytes().splitlines(keepends=True)
        records = _parse_lines(lines, self.path)
        kept = [line for line, record in zip(lines, records, strict=True) if _belongs(record, step, evaluation_due)]
        if len(kept) == len(lines):
            return
        fresh = self.path.with_name(self.path.name + ".tmp")
        with fresh.open("wb") as file:
            file.write(b"".join(kept))
            file.flush()
            os.fsync(file.fileno())
        self._file.close()
        fresh.replace(self.path)
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics file, in order; a half line at its end, as a killed run leaves, is left out.

    Raises UserError if there is no such file or if a line before the end is not a JSON object.
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
    except (ValueError, RecursionError):  # also what is not UTF-8
        return None
    return record if isinstance(record, dict) else None


def _parse_lines(lines: list[bytes], path: Path) -> list[dict[str, Any]]:
    records = []
    for index, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None:
            raise UserError(f"{path} line {index} is not a JSON object - delete that line")
        records.append(record)
    return records


def _belongs(record: dict[str, Any], last_step: int, evaluation_due: bool) -> bool:
    step = record.get("step")
    if evaluation_due and step == last_step and record.get("kind") in ("eval", "sample", "summary"):
        return False
    return record.get("kind") in LASTING_KINDS or not isinstance(step, int) or step <= last_step


def _mend_last_line(path: Path) -> None:
    """End the file with a whole line: cut half a record; where only the newline is missing, add it."""
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


def _plain(value: Any) -> Any:
    """``value`` in JSON's own types: array scalars unpacked, what is not finite as None, the rest as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)
