"""Writes records as TensorBoard scalars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .ranks import RankTable, mean
from .text import number

STEP_TAGS = ("loss", "lr", "grad_norm", "tokens_per_s", "data_wait", "mfu", "mfu_dense", "parameters", "tokens")
EVAL_TAGS = ("loss", "perplexity")
LAYER_TAGS = ("rank", "null_rank", "explained", "effective_rank")


class TensorBoardMonitor:
    """Writes event files to ``folder``.

    Tags: ``train/{loss,lr,grad_norm,tokens_per_s,data_wait,mfu,mfu_dense,parameters,tokens}``,
    ``validation/{loss,perplexity}``; for each layer ``rank/NAME``, ``null_rank/NAME``, ``explained/NAME``,
    ``effective_rank/NAME``; over all layers ``rank_mean/rank`` and ``rank_mean/null_rank``; and the text ``sample``.
    Events of an earlier process from ``purge_step`` on are hidden. A run resumed from step ``s`` passes ``s + 1``.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        # Imported here because it takes two seconds, which only the process with monitors should pay.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=30)
        self._table = RankTable()

    def write(self, record: dict[str, Any]) -> None:
        """Log the scalars of a record. Values that are missing or not finite are skipped."""
        self._table.update(record)
        kind, step = record.get("kind"), record.get("step", 0)
        if kind == "step":
            for tag in STEP_TAGS:
                self._scalar(f"train/{tag}", record.get(tag), step)
        elif kind == "eval":
            for tag in EVAL_TAGS:
                self._scalar(f"validation/{tag}", record.get(tag), step)
        elif kind in ("rank_event", "rank_check"):
            self._ranks(record.get("layers") or {}, step)
        elif kind == "sample":
            self._writer.add_text("sample", f"**{record.get('prompt', '')}**{record.get('text', '')}", step)

    def close(self) -> None:
        """Flush and close the event file. May be called twice."""
        self._writer.close()

    def _ranks(self, layers: dict[str, dict[str, Any]], step: int) -> None:
        tables = (
            self._table.ranks,
            self._table.null_ranks,
            self._table.explained,
            self._table.effective_ranks,
        )
        for tag, table in zip(LAYER_TAGS, tables, strict=True):
            for name in layers:
                self._scalar(f"{tag}/{name}", table.get(name), step)
        self._scalar("rank_mean/rank", mean(self._table.ranks.values()), step)
        self._scalar("rank_mean/null_rank", mean(self._table.null_ranks.values()), step)

    def _scalar(self, tag: str, value: Any, step: int) -> None:
        if (finite := number(value)) is not None:
            self._writer.add_scalar(tag, finite, step)
