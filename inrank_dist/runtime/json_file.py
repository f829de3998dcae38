"""JSON files of bounded size, which may come from anywhere."""

import json
from pathlib import Path
from typing import Any


class TooLarge(ValueError):
    """The file is larger than allowed."""


def read_json(path: Path, largest: int) -> Any:
    """Read a JSON file.

    Args:
        largest: largest size in bytes. A larger file is not read.

    Raises:
        OSError: the file cannot be read.
        TooLarge: the file is larger than ``largest``.
        ValueError: the file is not JSON in UTF-8, or it is nested too deeply.
    """
    if path.stat().st_size > largest:
        raise TooLarge(f"{path} is larger than {largest} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
