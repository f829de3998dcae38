"""A run folder as its pages see it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime import yaml_text
from ..runtime.errors import UserError
from ..train.checkpoint import check_run_folder
from ..train.monitors.jsonl import read_metrics
from .history import History

ON_FACTORS = ("spectron", "lora_muon")
"""Optimizers that orthogonalise the updates of factors. A full-rank model cannot have them."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run.

    Attributes:
        folder: the run folder.
        name: ``run.name``, or else the name of the folder; plain text.
        config: text of ``config.yaml``; empty if there is none.
        settings: the config as nested dicts; empty if it cannot be parsed, since its text is shown in any case.
        history: its records.
    """

    folder: Path
    name: str
    config: str
    settings: dict[str, Any]
    history: History


def read_run(folder: Path) -> Run:
    """Read the records and the config of a run, which may still be going.

    Raises:
        UserError: the folder does not exist, has no records or cannot be read.
    """
    folder = Path(folder)
    check_run_folder(folder)
    history = History(read_metrics(folder / "metrics.jsonl"))
    if not history.count:
        raise UserError(f"{folder / 'metrics.jsonl'} holds no records; train for at least one logged step")
    text, settings = read_settings(folder)
    name = str(value_of(settings, "run", "name") or folder.resolve().name)
    return Run(folder=folder, name=name, config=text, settings=settings, history=history)


def value_of(settings: dict[str, Any], section: str, key: str) -> Any:
    """Return a setting of a config that may be incomplete or damaged; None if it is not there."""
    values = settings.get(section)
    return values.get(key) if isinstance(values, dict) else None


def read_settings(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the text of the config of a run, and its settings as nested dicts; both empty without a config.

    Raises:
        UserError: it cannot be read.
    """
    file = folder / "config.yaml"
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        text = ""
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); make it readable") from None
    return text, _settings(text)


def write_page(file: Path, content: str) -> None:
    """Write a page atomically.

    Raises:
        UserError: it cannot be written.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        # Sampled text may contain a lone surrogate, which UTF-8 cannot encode.
        with temporary.open("w", encoding="utf-8", errors="replace") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(file)
    except OSError as error:
        raise UserError(
            f"{file} cannot be written ({error.strerror or error}); write --output FILE with a file that can"
        ) from None


def _settings(text: str) -> dict[str, Any]:
    try:
        settings = yaml_text.load(text)
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}
