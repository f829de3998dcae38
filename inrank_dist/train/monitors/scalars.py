"""What a record says to TensorBoard and to experiment trackers: numbers and texts, by tag."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from textwrap import indent
from typing import Any

import numpy as np

from .ranks import RankTable, mean
from .text import fixed, number

TRAIN_TAGS = ("loss", "lr", "grad_norm", "parameters", "tokens", "flops")
SPEED_TAGS = ("tokens_per_s", "data_wait", "mfu", "mfu_dense", "seconds", "peak_memory", "resident_memory")
EVAL_TAGS = ("loss", "perplexity", "bits_per_byte")
LAYER_TAGS = ("rank", "null_rank", "explained", "effective_rank")
SPECTRUM_TAGS = ("effective_rank", "null_effective_rank", "stable_rank", "null_stable_rank")
DENSE_TAGS = {
    "updates": ("update_", SPECTRUM_TAGS),
    "weights": ("weight_", SPECTRUM_TAGS),
    "stable_ranks": ("", ("stable_rank", "scaled_stable_rank")),
}
"""Kind of record -> prefix and tags of the values of each dense layer."""


@dataclass
class Entries:
    """What is written for one record.

    Attributes:
        step: optimizer step of all entries.
        scalars: finite numbers by tag.
        texts: Markdown by tag.
        histograms: values by tag.
    """

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    histograms: dict[str, list[float]] = field(default_factory=dict)


class Curves:
    """Makes entries from the records of a run, which it must see in order.

    TensorBoard sorts groups of tags by name, so all tags of single layers are in ``weights``, after the groups to look
    at first. Tags of scalars:

    - ``train/{loss,lr,grad_norm,parameters,tokens,flops}``, and ``train/mean_{rank,null_rank,explained,
      effective_rank}`` over all low-rank layers
    - ``eval/{loss,perplexity,bits_per_byte}``, and ``eval/loss/LABEL`` for each source of a mixture
    - ``speed/{tokens_per_s,data_wait,mfu,mfu_dense,seconds,peak_memory,resident_memory}``, and
      ``speed/rank_event_seconds``
    - ``weights/{rank,null_rank,explained,effective_rank}/NAME`` for each low-rank layer
    - ``weights/update_{effective_rank,null_effective_rank,stable_rank,null_stable_rank}/NAME`` for each dense layer
      whose cumulative update is tracked, and ``weights/weight_...`` for each whose weight is
    - ``weights/{stable_rank,scaled_stable_rank}/NAME`` for each dense layer while these decide when it is factored

    The last value of a tag is the one at the end of the run: the summary adds those that no step has written. Tags of
    texts: ``sample`` and, after each rank event and at the end, ``rank_table``. Tags of histograms, where records have
    singular values: ``weights/log10_singular_values/NAME``, ``weights/update_log10_singular_values/NAME`` and
    ``weights/weight_log10_singular_values/NAME``.
    """

    def __init__(self) -> None:
        self._table = RankTable()
        self._written: set[str] = set()

    def entries(self, record: Mapping[str, Any]) -> Entries:
        """Return the entries of a record. Values that are missing or not finite are left out."""
        self._table.update(dict(record))
        kind = record.get("kind")
        made = Entries(int(number(record.get("step")) or 0))
        if kind in ("step", "summary"):
            _add(made, "train", {tag: record.get(tag) for tag in TRAIN_TAGS})
            _add(made, "speed", {tag: record.get(tag) for tag in SPEED_TAGS})
        if kind == "eval":
            _add(made, "eval", {tag: record.get(tag) for tag in EVAL_TAGS})
            _add(made, "eval/loss", record.get("sources") or {})
        elif kind in DENSE_TAGS:
            prefix, tags = DENSE_TAGS[kind]
            for name, layer in (record.get("layers") or {}).items():
                _add(made, "weights", {f"{prefix}{tag}/{name}": layer.get(tag) for tag in tags})
                _add_spectrum(made, f"weights/{prefix}log10_singular_values/{name}", layer)
        elif kind in ("rank_event", "rank_check"):
            self._add_ranks(made, record)
        elif kind == "sample":
            made.texts["sample"] = verbatim(f"{record.get('prompt', '')}{record.get('text', '')}")
        elif kind == "summary":
            _add(made, "train", {"loss": record.get("train_loss")})
            _add(made, "eval", {"loss": record.get("validation_loss"), "perplexity": record.get("perplexity")})
            made.scalars = {tag: value for tag, value in made.scalars.items() if tag not in self._written}
        if kind in ("rank_event", "summary") and self._table.ranks:
            made.texts["rank_table"] = self._markdown()
        self._written.update(made.scalars)
        return made

    def _add_ranks(self, made: Entries, record: Mapping[str, Any]) -> None:
        table, layers = self._table, record.get("layers") or {}
        tables = dict(
            zip(LAYER_TAGS, (table.ranks, table.null_ranks, table.explained, table.effective_ranks), strict=True)
        )
        for tag, values in tables.items():
            _add(made, f"weights/{tag}", {name: values.get(name) for name in layers})
            _add(made, "train", {f"mean_{tag}": mean(values.values())})
        for name, layer in layers.items():
            _add_spectrum(made, f"weights/log10_singular_values/{name}", layer)
        if record.get("kind") == "rank_event":
            _add(made, "speed", {"rank_event_seconds": record.get("seconds")})

    def _markdown(self) -> str:
        table = self._table
        lines = ["| layer | rank | found | null rank | explained | |", "|---|---|---|---|---|---|"]
        for name, rank in table.ranks.items():
            null, explained = fixed(table.null_ranks.get(name), 0), fixed(table.explained.get(name), 3)
            found = fixed(table.found.get(name) if name in table.null_ranks else None, 0)
            lines.append(f"| `{name}` | {rank:g} | {found} | {null} | {explained} | {', '.join(table.flags(name))} |")
        return "\n".join([*lines, "", *table.notes()])


def verbatim(text: str) -> str:
    """Return Markdown that shows a text as it is, also one that holds Markdown or HTML."""
    return indent(text, "    ", lambda line: True)


def _add(made: Entries, group: str, values: Mapping[str, Any]) -> None:
    for tag, value in values.items():
        if (finite := number(value)) is not None:
            made.scalars[f"{group}/{tag}"] = finite


def _add_spectrum(made: Entries, tag: str, layer: Mapping[str, Any]) -> None:
    """Add the histogram of all singular values, of which records hold only some at their 1-based ``indices``. Between
    them the logarithm is interpolated. Values that are zero are left out."""
    known = [
        (index, math.log10(value))
        for index, value in zip(layer.get("indices") or (), layer.get("sigma") or (), strict=False)
        if (number(value) or 0) > 0
    ]
    if known:
        indices, logarithms = zip(*known, strict=True)
        made.histograms[tag] = np.interp(np.arange(indices[0], indices[-1] + 1), indices, logarithms).tolist()
