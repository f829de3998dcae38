"""What the records say about ranks so far, each rank beside its null rank and the share that it explains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .text import number, plural

NULL_TOLERANCE = 0.02
"""A rank within this fraction of its null rank counts as the null rank."""


def equals_null(rank: Any, null_rank: Any) -> bool:
    """True if the rule found no more than it finds on untrained factors, within 2%."""
    found, null = number(rank), number(null_rank)
    return found is not None and null is not None and abs(found - null) <= NULL_TOLERANCE * null


def mean(values: Iterable[Any]) -> float | None:
    """Mean over the values that are finite numbers; None if there are none."""
    finite = [x for value in values if (x := number(value)) is not None]
    return fmean(finite) if finite else None


@dataclass(frozen=True, kw_only=True)
class RankChange:
    """One rank event as a line or a row tells it. Every mean is over all low-rank layers, those that kept their rank
    included, so that it can be compared with the lines around it.

    Attributes:
        step, action, seconds: as recorded.
        changed, total: layers that the event names, and all.
        before, after: mean rank.
        found: mean of the ranks that the rule found, which the freeze may have rounded.
        null_rank: mean null rank.
        explained: mean share of the spectrum that the ranks explain *after* the event.
        notes, short_notes: what a reader must know of these ranks, as sentences without a full stop, and in few words.
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
    """The present rank, null rank, explained and effective rank of every layer, kept current from records.

    ``found`` holds ranks before they were rounded at the freeze, which null ranks are to be held against. ``explained``
    is the share that the rank in ``ranks`` explains, at the last decision; of records that lack ``reached`` that of the
    rank before the decision. ``ranks`` and the other tables map a layer's name to its last known finite value. A check
    and an event of the same step may come in either order: the event's outcome is the rank.

    ``initial_rank`` and ``threshold`` are those of the settings, None where no record tells them. ``shrinks`` says
    whether the last decision could lower ranks, so that none is pinned by its start.
    """

    def __init__(self) -> None:
        self.ranks: dict[str, float] = {}
        self.found: dict[str, float] = {}
        self.null_ranks: dict[str, float] = {}
        self.explained: dict[str, float] = {}
        self.effective_ranks: dict[str, float] = {}
        self.initial_rank: float | None = None
        self.threshold: float | None = None
        self.shrinks = False
        self._paired: set[str] = set()
        self._event_step: dict[str, Any] = {}

    def update(self, record: dict[str, Any]) -> None:
        """Take in one record; records that say nothing of ranks change nothing."""
        kind, step = record.get("kind"), record.get("step")
        if kind == "start":
            for name, rank in (record.get("ranks") or {}).items():
                self.set_layer(name, rank=rank)
        if kind in ("start", "summary"):
            for name, layer in (record.get("rank_table" if kind == "start" else "ranks") or {}).items():
                self._take(name, layer, "rank")
        elif kind in ("rank_event", "rank_check"):
            for name, layer in (record.get("layers") or {}).items():
                if kind == "rank_event":
                    self._take(name, layer, "to")
                    self._event_step[name] = step
                elif self._event_step.get(name, -1) != step:
                    self._take(name, layer, "rank")
                _set(self.null_ranks, name, layer.get("null_rank"))
                _set(self.effective_ranks, name, layer.get("effective_rank"))
        else:
            return
        self.shrinks = bool(record.get("shrinks", self.shrinks))
        for key in ("initial_rank", "threshold"):
            if (value := number(record.get(key))) is not None:
                setattr(self, key, value)

    def change(self, record: dict[str, Any]) -> RankChange:
        """What a ``rank_event`` did, after ``update`` has taken it in."""
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
        """What a reader must know of the present ranks, the most important first."""
        layers = plural(len(self.ranks), "layer")
        notes = []
        if count := len(self.null_layers):
            notes.append(
                f"in {count:,} of {layers} the rank is the null rank within 2%: "
                "the rule found no more than it finds on untrained factors"
            )
        if count := len(self.pinned_layers):
            start = f"initial_rank {self.initial_rank:g}"
            notes.append(f"in {count:,} of {layers} the rank never left {start}: pinned by its start")
        if count := len(self.cut_layers):
            cut = f"threshold {self.threshold:g}"
            notes.append(f"in {count:,} of {layers} the rank explains less than {cut}: cut at the freeze")
        return notes

    @property
    def null_layers(self) -> list[str]:
        """Names of the layers in which the rule found their null rank within 2%."""
        return [name for name in self.ranks if self._at_null(name)]

    @property
    def pinned_layers(self) -> list[str]:
        """Names of the layers that the rule has judged and in which the rank never left ``initial_rank``."""
        return [name for name in self.ranks if self._pinned(name)]

    @property
    def cut_layers(self) -> list[str]:
        """Names of the layers below the threshold because the freeze kept less than the rule had found."""
        return [name for name in self.ranks if self._below(name) and self.ranks[name] < self.found[name]]

    def flags(self, name: str) -> list[str]:
        """Why the rank of a layer is not simply a finding, in few characters each; what ``notes`` counts, and any rank
        that explains less than the threshold."""
        flags = ["= null"] if self._at_null(name) else []
        flags += ["= start"] if self._pinned(name) else []
        return flags + ([f"< {self.threshold:g}"] if self._below(name) else [])

    def _at_null(self, name: str) -> bool:
        return equals_null(self.found.get(name), self.null_ranks.get(name))

    def _pinned(self, name: str) -> bool:
        return not self.shrinks and name in self.null_ranks and self.found.get(name) == self.initial_rank

    def _below(self, name: str) -> bool:
        """Whether the rank explains less than the threshold; False where the records do not pair the two."""
        return self.threshold is not None and name in self._paired and self.explained[name] < self.threshold

    def _take(self, name: str, layer: dict[str, Any], key: str) -> None:
        known = {part: layer.get(part) for part in ("found", "null_rank", "reached", "explained")}
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
    ) -> None:
        """What is known of one layer; None says nothing, but for ``found``, which is then ``rank``.

        Args:
            reached: share of the spectrum that ``rank`` explains.
            explained: share that the rank before it explains; shown only where ``reached`` is not known.
        """
        _set(self.ranks, name, rank)
        _set(self.found, name, rank if found is None else found)
        _set(self.null_ranks, name, null_rank)
        _set(self.explained, name, explained if reached is None else reached)
        if number(reached) is not None:
            self._paired.add(name)


def _set(table: dict[str, float], name: str, value: Any) -> None:
    if (finite := number(value)) is not None:
        table[name] = finite
