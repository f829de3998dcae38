"""The current ranks of a run, from its records, with the null rank and the explained share of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ...runtime.words import plural
from .text import number

NULL_TOLERANCE = 0.02
"""Relative difference up to which a rank counts as equal to its null rank."""


def equals_null(rank: Any, null_rank: Any) -> bool:
    """Whether the rank is within 2% of what the rule finds on untrained factors."""
    found, null = number(rank), number(null_rank)
    return found is not None and null is not None and abs(found - null) <= NULL_TOLERANCE * null


def mean(values: Iterable[Any]) -> float | None:
    """Mean of the values that are finite numbers; None if there are none."""
    finite = [x for value in values if (x := number(value)) is not None]
    return fmean(finite) if finite else None


REMEDIES = {"lowrank.multiple_of": "a smaller value keeps more", "lowrank.final": "per_layer does not"}
"""What to do about a setting that keeps ranks below the threshold, if it is not to write a larger value."""


@dataclass(frozen=True, kw_only=True)
class RankChange:
    """Summary of one rank event. Means are over all low-rank layers, including those that kept their rank, so that they
    are comparable with other lines.

    Attributes:
        step, action, seconds: as recorded.
        changed, total: number of layers in the event, and of all low-rank layers.
        before, after: mean rank.
        found: mean of the ranks that the rule found, which the freeze may have rounded.
        null_rank: mean null rank.
        explained: mean share of the spectrum that the ranks explain *after* the event.
        notes, short_notes: what a reader must know about these ranks, as sentences without a full stop and as phrases.
    """

    step: int
    action: str
    seconds: float | None
    changed: int
    total: int
    before: float | None
    after: float | None
    found: float | None
    null_rank: float | None
    explained: float | None
    notes: list[str]
    short_notes: list[str]


class RankTable:
    """The current rank, null rank, explained share and effective rank of every layer, updated from records.

    ``ranks`` and the other tables map a layer's name to its last known finite value. ``found`` holds the ranks before
    rounding at the freeze, which are the ones to compare with null ranks. ``explained`` is the share that the rank in
    ``ranks`` explained at the last decision; for records without ``reached``, the share of the rank before the
    decision. A check and an event of the same step may come in either order; the rank is then that of the event.
    ``limits`` holds the settings that keep ranks below the threshold, with their values.

    ``initial_rank`` and ``threshold`` are the settings, None if no record contains them. ``shrinks`` is whether the
    last decision could lower ranks, in which case no rank is pinned by its start.
    """

    def __init__(self) -> None:
        self.ranks: dict[str, float] = {}
        self.found: dict[str, float] = {}
        self.null_ranks: dict[str, float] = {}
        self.explained: dict[str, float] = {}
        self.effective_ranks: dict[str, float] = {}
        self.limits: dict[str, str] = {}
        self.initial_rank: float | None = None
        self.threshold: float | None = None
        self.shrinks = False
        self._paired: set[str] = set()
        self._event_step: dict[str, Any] = {}

    def update(self, record: dict[str, Any]) -> None:
        """Update the tables from one record. Records without ranks change nothing."""
        kind, step = record.get("kind"), record.get("step")
        if kind == "start":
            for name, rank in (record.get("ranks") or {}).items():
                self.set_layer(name, rank=rank)
        if kind in ("start", "summary"):
            for name, layer in (record.get("rank_table" if kind == "start" else "ranks") or {}).items():
                self._update_layer(name, layer, "rank")
        elif kind in ("rank_event", "rank_check"):
            for name, layer in (record.get("layers") or {}).items():
                if kind == "rank_event":
                    self._update_layer(name, layer, "to")
                    self._event_step[name] = step
                elif self._event_step.get(name, -1) != step:
                    self._update_layer(name, layer, "rank")
                _set(self.null_ranks, name, layer.get("null_rank"))
                _set(self.effective_ranks, name, layer.get("effective_rank"))
        else:
            return
        self.shrinks = bool(record.get("shrinks", self.shrinks))
        for key in ("initial_rank", "threshold"):
            if (value := number(record.get(key))) is not None:
                setattr(self, key, value)

    def change(self, record: dict[str, Any]) -> RankChange:
        """Summarize a ``rank_event``. Call after ``update``."""
        layers = record.get("layers") or {}
        before = {name: layers[name].get("from") if name in layers else rank for name, rank in self.ranks.items()}
        return RankChange(
            step=int(number(record.get("step")) or 0),
            action=str(record.get("action", "change")),
            seconds=number(record.get("seconds")),
            changed=len(layers),
            total=len(self.ranks),
            before=mean(before.values()),
            after=mean(self.ranks.values()),
            found=mean(self.found.values()),
            null_rank=mean(self.null_ranks.values()),
            explained=mean(self.explained.values()),
            notes=self.notes(),
            short_notes=[
                f"{len(names):,} of {len(self.ranks):,} {what}"
                for names, what in (
                    (self.null_layers, "= null rank"),
                    (self.pinned_layers, "= start"),
                    (self.cut_layers, "cut below the threshold"),
                )
                if names
            ],
        )

    def notes(self) -> list[str]:
        """What a reader must know about the current ranks, the most important first."""
        layers = plural(len(self.ranks), "layer")
        notes = []
        if count := len(self.null_layers):
            notes.append(
                f"in {count:,} of {layers} the rank found is the null rank within 2%: "
                "the rule found no more than it finds on untrained factors"
            )
        if count := len(self.pinned_layers):
            start = f"initial_rank {self.initial_rank:g}"
            notes.append(f"in {count:,} of {layers} the rank never left {start}: pinned by its start")
        below = [name for name in self.ranks if self._below(name)]
        for limit, count in Counter(self.limits[name] for name in below if name in self.limits).items():
            remedy = REMEDIES.get(limit.partition(" ")[0], "a larger value keeps more")
            explains = f"in {count:,} of {layers} the rank explains less than threshold {self.threshold:g}"
            notes.append(f"{explains}: {limit} cuts it; {remedy}")
        return notes

    @property
    def null_layers(self) -> list[str]:
        """Names of the layers whose rank equals their null rank within 2%."""
        return [name for name in self.ranks if self._at_null(name)]

    @property
    def pinned_layers(self) -> list[str]:
        """Names of the layers that the rule has judged but whose rank never left ``initial_rank``."""
        return [name for name in self.ranks if self._pinned(name)]

    @property
    def cut_layers(self) -> list[str]:
        """Names of the layers below the threshold because the freeze kept less than the rule had found."""
        return [name for name in self.ranks if self._below(name) and self.ranks[name] < self.found[name]]

    def flags(self, name: str) -> list[str]:
        """Short flags for a rank that is not simply a finding: the cases of ``notes``, and a rank that explains less
        than the threshold."""
        flags = ["= null"] if self._at_null(name) else []
        flags += ["= start"] if self._pinned(name) else []
        return flags + ([f"< {self.threshold:g}"] if self._below(name) else [])

    def _at_null(self, name: str) -> bool:
        return equals_null(self.found.get(name), self.null_ranks.get(name))

    def _pinned(self, name: str) -> bool:
        return not self.shrinks and name in self.null_ranks and self.found.get(name) == self.initial_rank

    def _below(self, name: str) -> bool:
        """Whether the rank explains less than the threshold; False if the records do not give the share of this
        rank."""
        return self.threshold is not None and name in self._paired and self.explained[name] < self.threshold

    def _update_layer(self, name: str, layer: dict[str, Any], key: str) -> None:
        known = {part: layer.get(part) for part in ("found", "null_rank", "reached", "explained", "limit")}
        self.set_layer(name, rank=layer.get(key), **known)

    def set_layer(
        self,
        name: str,
        *,
        rank: Any,
        found: Any = None,
        null_rank: Any = None,
        reached: Any = None,
        explained: Any = None,
        limit: Any = None,
    ) -> None:
        """Update the values of one layer. None leaves a value unchanged, except ``found``, which defaults to ``rank``.

        Args:
            reached: share of the spectrum that ``rank`` explains.
            explained: share that the previous rank explains; used only if ``reached`` is unknown.
            limit: setting that keeps the rank below the threshold, as text.
        """
        self.limits.pop(name, None)
        if limit:
            self.limits[name] = str(limit)
        _set(self.ranks, name, rank)
        _set(self.found, name, rank if found is None else found)
        _set(self.null_ranks, name, null_rank)
        _set(self.explained, name, explained if reached is None else reached)
        if number(reached) is not None:
            self._paired.add(name)


def _set(table: dict[str, float], name: str, value: Any) -> None:
    if (finite := number(value)) is not None:
        table[name] = finite
