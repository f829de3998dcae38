"""What the records say about ranks so far, each rank beside its null rank."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from inrank_dist.train.monitors.text import number

NULL_TOLERANCE = 0.02
"""A rank within this fraction of its null rank counts as the null rank."""


def equals_null(rank: Any, null_rank: Any) -> bool:
    """True if the rule found no more than it finds on untrained factors, within 2%."""
    found, null = number(rank), number(null_rank)
    return found is not None and null is not None and abs(found - null) <= NULL_TOLERANCE * null


def found(layer: dict[str, Any], key: str) -> Any:
    """The rank that the rule found in a layer of a record; the freeze may have rounded it to what is below ``key``."""
    return layer.get("found", layer.get(key))


def mean(values: Iterable[Any]) -> float | None:
    """Mean over the values that are finite numbers; None if there are none."""
    finite = [x for value in values if (x := number(value)) is not None]
    return fmean(finite) if finite else None


class RankTable:
    """The present rank, null rank, explained and effective rank of every layer, kept current from records.

    ``found`` holds ranks before they were rounded at the freeze, which null ranks are to be held against.
    ``ranks`` and the other tables map a layer's name to its last known finite value. A check and an event
    of the same step may come in either order: the event's outcome is the rank.
    """

    def __init__(self) -> None:
        self.ranks: dict[str, float] = {}
        self.found: dict[str, float] = {}
        self.null_ranks: dict[str, float] = {}
        self.explained: dict[str, float] = {}
        self.effective_ranks: dict[str, float] = {}
        self._event_step: dict[str, Any] = {}

    def update(self, record: dict[str, Any]) -> None:
        """Take in one record; records that say nothing of ranks change nothing."""
        kind, step = record.get("kind"), record.get("step")
        if kind == "start":
            for name, rank in (record.get("ranks") or {}).items():
                self._set(self.ranks, name, rank)
                self._set(self.found, name, rank)
        elif kind == "summary":
            for name, layer in (record.get("ranks") or {}).items():
                self._set(self.ranks, name, layer.get("rank"))
                self._set(self.found, name, found(layer, "rank"))
                self._set(self.null_ranks, name, layer.get("null_rank"))
        elif kind in ("rank_event", "rank_check"):
            for name, layer in (record.get("layers") or {}).items():
                if kind == "rank_event":
                    self._set(self.ranks, name, layer.get("to"))
                    self._set(self.found, name, found(layer, "to"))
                    self._event_step[name] = step
                elif self._event_step.get(name, -1) != step:
                    self._set(self.ranks, name, layer.get("rank"))
                    self._set(self.found, name, found(layer, "rank"))
                self._set(self.null_ranks, name, layer.get("null_rank"))
                self._set(self.explained, name, layer.get("explained"))
                self._set(self.effective_ranks, name, layer.get("effective_rank"))

    @property
    def null_layers(self) -> list[str]:
        """Names of the layers in which the rule found their null rank within 2%."""
        return [name for name, rank in self.found.items() if equals_null(rank, self.null_ranks.get(name))]

    @staticmethod
    def _set(table: dict[str, float], name: str, value: Any) -> None:
        if (finite := number(value)) is not None:
            table[name] = finite
