"""What a record says to TensorBoard and to experiment trackers: numbers and texts, by tag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .ranks import RankTable, mean
from .text import fixed, number

STEP_TAGS = ("loss", "lr", "grad_norm", "tokens_per_s", "data_wait", "mfu", "mfu_dense", "parameters", "tokens")
EVAL_TAGS = ("loss", "perplexity")
UPDATE_TAGS = ("effective_rank", "null_effective_rank", "stable_rank", "null_stable_rank")
SUMMARY_TAGS = (
    *("train_loss", "validation_loss", "perplexity", "tokens", "seconds", "flops", "peak_memory"),
    *("parameters", "parameters_dense", "parameters_start"),
)


@dataclass
class Entries:
    """What is written for one record.

    Attributes:
        step: optimizer step of all entries.
        scalars: finite numbers by tag.
        texts: Markdown by tag.
    """

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


class Curves:
    """Makes entries from the records of a run, which it must see in order.

    Tags of scalars:

    - ``train/{loss,lr,grad_norm,tokens_per_s,data_wait,mfu,mfu_dense,parameters,tokens}``
    - ``validation/{loss,perplexity}``, and ``validation_loss/LABEL`` for each source of a mixture
    - ``rank/NAME``, ``null_rank/NAME``, ``explained/NAME``, ``effective_rank/NAME`` for each layer
    - ``rank_mean/{rank,null_rank}`` over all layers
    - ``update_{effective_rank,null_effective_rank,stable_rank,null_stable_rank}/NAME`` for each dense layer whose
      cumulative update is tracked
    - ``summary/{train_loss,validation_loss,perplexity,parameters,...}`` at the end

    Tags of texts: ``sample`` and, at the end, ``rank_table``.
    """

    def __init__(self) -> None:
        self._table = RankTable()

    def entries(self, record: Mapping[str, Any]) -> Entries:
        """Return the entries of a record. Values that are missing or not finite are left out."""
        self._table.update(dict(record))
        kind = record.get("kind")
        made = Entries(int(number(record.get("step")) or 0))
        if kind == "step":
            _add(made, "train", {tag: record.get(tag) for tag in STEP_TAGS})
        elif kind == "eval":
            _add(made, "validation", {tag: record.get(tag) for tag in EVAL_TAGS})
            _add(made, "validation_loss", record.get("sources") or {})
        elif kind == "updates":
            for name, layer in (record.get("layers") or {}).items():
                for tag in UPDATE_TAGS:
                    _add(made, f"update_{tag}", {name: layer.get(tag)})
        elif kind in ("rank_event", "rank_check"):
            self._add_ranks(made, record.get("layers") or {})
        elif kind == "sample":
            made.texts["sample"] = f"**{record.get('prompt', '')}**{record.get('text', '')}"
        elif kind == "summary":
            _add(made, "summary", {tag: record.get(tag) for tag in SUMMARY_TAGS})
            if self._table.ranks:
                made.texts["rank_table"] = self._markdown()
        return made

    def _add_ranks(self, made: Entries, layers: Mapping[str, Any]) -> None:
        table = self._table
        tables = {
            "rank": table.ranks,
            "null_rank": table.null_ranks,
            "explained": table.explained,
            "effective_rank": table.effective_ranks,
        }
        for tag, values in tables.items():
            _add(made, tag, {name: values.get(name) for name in layers})
        means = {"rank": mean(table.ranks.values()), "null_rank": mean(table.null_ranks.values())}
        _add(made, "rank_mean", means)

    def _markdown(self) -> str:
        table = self._table
        lines = ["| layer | rank | null rank | explained | |", "|---|---|---|---|---|"]
        for name, rank in table.ranks.items():
            null, explained = fixed(table.null_ranks.get(name), 0), fixed(table.explained.get(name), 3)
            lines.append(f"| {name} | {rank:g} | {null} | {explained} | {', '.join(table.flags(name))} |")
        return "\n".join([*lines, "", *table.notes()])


def _add(made: Entries, group: str, values: Mapping[str, Any]) -> None:
    for tag, value in values.items():
        if (finite := number(value)) is not None:
            made.scalars[f"{group}/{tag}"] = finite
