"""Writes records to TensorBoard."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from ...runtime import yaml_text
from .hparams import session
from .scalars import Curves, verbatim

Layout = dict[str, dict[str, list[Any]]]


class TensorBoardMonitor:
    """Writes the entries of ``Curves`` to event files in ``folder``, with a layout for the page CUSTOM SCALARS and the
    settings for the page HPARAMS.

    Events of an earlier process from ``purge_step`` on are hidden. A run resumed from step ``s`` passes ``s + 1``.

    Args:
        config: the configuration as YAML, which is also the text ``config``.
    """

    def __init__(self, folder: Path, purge_step: int | None = None, config: str = "") -> None:
        # Imported here because it takes two seconds, which only the process with monitors should pay.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=30)
        self._file = cast(Any, self._writer.file_writer)
        self._curves = Curves()
        self._session_end: Any = None
        if config:
            self._writer.add_text("config", verbatim(config), purge_step or 0)
            begin, self._session_end = session(yaml_text.load(config))
            for summary in begin:
                self._file.add_summary(summary)

    def write(self, record: dict[str, Any]) -> None:
        """Log the entries of a record."""
        if record.get("kind") == "start":
            self._writer.add_custom_scalars(layout(record))
        entries = self._curves.entries(record)
        for tag, value in entries.scalars.items():
            self._writer.add_scalar(tag, value, entries.step)
        for tag, text in entries.texts.items():
            self._writer.add_text(tag, text, entries.step)
        for tag, values in entries.histograms.items():
            self._writer.add_histogram(tag, np.array(values), entries.step)
        if record.get("kind") == "summary" and self._session_end is not None:
            self._file.add_summary(self._session_end)

    def close(self) -> None:
        """Flush and close the event file. May be called twice."""
        self._writer.close()


def layout(start: Mapping[str, Any]) -> Layout:
    """Return the charts of a run for the page CUSTOM SCALARS: category -> title -> kind and regular expressions of
    tags. Layers whose names differ in numbers only share a chart.

    Args:
        start: the record of the start of the run.
    """
    training = {
        "loss": ["train/loss", "eval/loss"],
        "learning rate": ["train/lr"],
        "gradient norm": ["train/grad_norm"],
    }
    if start.get("sources"):
        training["validation loss by source"] = ["eval/loss/.*"]
    categories = {"training": training}
    if start.get("mode") != "full":
        ranks = {"mean rank": ["train/mean_rank", "train/mean_null_rank"], "parameters": ["train/parameters"]}
        ranks["mean explained ratio"] = ["train/mean_explained"]
        for names in dict.fromkeys(re.sub(r"\d+", "#", name) for name in start.get("ranks") or ()):
            ranks[f"rank of {names}"] = ["weights/rank/" + re.escape(names).replace(r"\#", r"\d+")]
        categories["rank"] = ranks
    speed = {"tokens per second": ["speed/tokens_per_s"], "share of the time waiting for data": ["speed/data_wait"]}
    categories["speed"] = speed
    return {
        category: {title: ["Multiline", [f"^{tag}$" for tag in tags]] for title, tags in charts.items()}
        for category, charts in categories.items()
    }
