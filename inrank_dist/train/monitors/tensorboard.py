"""Writes records to TensorBoard."""

from __future__ import annotations

from pathlib import Path
from textwrap import indent
from typing import Any

from .scalars import Curves


class TensorBoardMonitor:
    """Writes the entries of ``Curves`` to event files in ``folder``, and the configuration as the text ``config``.

    Events of an earlier process from ``purge_step`` on are hidden. A run resumed from step ``s`` passes ``s + 1``.
    """

    def __init__(self, folder: Path, purge_step: int | None = None, config: str = "") -> None:
        # Imported here because it takes two seconds, which only the process with monitors should pay.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=30)
        self._curves = Curves()
        if config:
            self._writer.add_text("config", indent(config, "    "), purge_step or 0)

    def write(self, record: dict[str, Any]) -> None:
        """Log the entries of a record."""
        entries = self._curves.entries(record)
        for tag, value in entries.scalars.items():
            self._writer.add_scalar(tag, value, entries.step)
        for tag, text in entries.texts.items():
            self._writer.add_text(tag, text, entries.step)

    def close(self) -> None:
        """Flush and close the event file. May be called twice."""
        self._writer.close()
