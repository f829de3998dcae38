"""Several runs beside each other: which are seeds of one config, what they cost and reached, in what they differ."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..runtime.errors import UserError
from ..runtime.progress import counted
from ..runtime.yaml_text import shown
from ..train.monitors.ranks import mean
from ..train.monitors.text import number
from .history import History
from .run import Run, read_run
from .timeline import Timeline, timeline

IGNORED = ("run.", "data.cache_dir", "checkpoint.", "log.")
"""Settings, or sections, that do not change what is trained. The seed tells the runs of one config apart."""

LONGEST = 40
"""Characters of a name that are shown."""

COSTS = ("tokens", "flops", "seconds")


@dataclass(frozen=True)
class Member:
    """A run of a comparison. ``label`` is plain text of at most ``LONGEST`` printable characters, unlike the others."""

    label: str
    run: Run

    @property
    def history(self) -> History:
        return self.run.history

    @property
    def ended(self) -> bool:
        return self.history.ended

    @cached_property
    def timeline(self) -> Timeline:
        """Where its steps lie on the axes."""
        return timeline(self.label, self.history)

    @cached_property
    def settings(self) -> dict[str, str]:
        """All settings by dotted key, as YAML; empty without a config."""
        return {
            f"{section}.{key}": shown(value)
            for section, values in self.run.settings.items()
            if isinstance(values, dict)
            for key, value in values.items()
        }

    @property
    def seed(self) -> str:
        return self.settings.get("run.seed", shown(self.history.first("seed")))

    @property
    def loss(self) -> float | None:
        """Validation loss, nats per token."""
        return self.history.validation_loss

    @property
    def memory(self) -> float | None:
        """Peak memory of process 0, bytes."""
        peaks = [value for key in ("peak_memory", "resident_memory") for _, value in self.history.curve(key) if value]
        value = number(self.history.summary.get("peak_memory"))
        return value if value is not None else max(peaks, default=None)

    @property
    def rank(self) -> float | None:
        """Mean rank of the low-rank layers."""
        return mean(self.history.table.ranks.values())

    @property
    def null_rank(self) -> float | None:
        return mean(self.history.table.null_ranks.values())

    @property
    def data(self) -> tuple[Any, ...]:
        """What tells its data from others: it changes with the text, the tokenizer and the block length."""
        start = self.history.start
        return (
            start.get("data_fingerprint"),
            *(start.get(key) for key in ("train_tokens", "validation_tokens", "unigram_entropy")),
        )

    @cached_property
    def evaluated(self) -> dict[str, tuple[list[float], list[float]]]:
        """Cost -> its value at each evaluation, and the validation losses; without costs that were not recorded."""
        axes = self.timeline.axes
        points = [(step, loss) for step, loss in self.history.eval_curve("loss") if loss is not None]
        steps, losses = [step for step, _ in points], [loss for _, loss in points]
        known = [axis for axis in COSTS if axis in axes and points]
        return {axis: (np.interp(steps, axes["step"], axes[axis]).tolist(), losses) for axis in known}

    def loss_at(self, axis: str, budget: float) -> float | None:
        """Validation loss at a cost, linear between evaluations; None before the first and beyond the last one."""
        costs, losses = self.evaluated.get(axis, ([], []))
        if not costs or not costs[0] <= budget <= costs[-1] * (1 + 1e-9):
            return None
        return float(np.interp(budget, costs, losses))


@dataclass(frozen=True)
class Group:
    """Runs of one config that differ in their seeds."""

    label: str
    members: list[Member]

    @property
    def compared(self) -> list[Member]:
        """The finished runs, or all if none is finished: the means of others would mix different lengths."""
        return [member for member in self.members if member.ended] or self.members

    def values(self, figure: Callable[[Member], float | None]) -> list[float]:
        """A figure of each compared run that has it."""
        return [value for member in self.compared if (value := figure(member)) is not None]

    def mean(self, figure: Callable[[Member], float | None]) -> float | None:
        values = self.values(figure)
        return fmean(values) if values else None


class Comparison:
    """The runs of several folders, grouped.

    Args:
        folders: run folders, at least two.

    Raises:
        UserError: a folder holds no records, is given twice, or there is one only.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        if len(folders) < 2:
            raise UserError(f"only {folders[0]} is given; write two run folders or more")
        seen: dict[Path, Path] = {}
        for folder in folders:
            if (same := seen.setdefault(folder.resolve(), folder)) is not folder:
                raise UserError(f"{folder} is the same folder as {same}; write each run once")
        runs = [read_run(folder) for folder in counted(folders, "reading the runs", unit="runs")]
        names = labels([run.folder for run in runs])
        self.members = [Member(name, run) for name, run in zip(names, runs, strict=True)]
        self.groups = grouped(self.members)

    @cached_property
    def differences(self) -> list[tuple[str, list[str]]]:
        """Settings and circumstances that differ, and their value in each group; ``-`` where it is unknown."""
        firsts = [group.members[0] for group in self.groups]
        keys = dict.fromkeys(key for member in firsts for key in member.settings if not key.startswith(IGNORED))
        rows = {key: [member.settings.get(key, "-") for member in firsts] for key in keys}
        rows["processes"] = [_processes(member) for member in firsts]
        for key in ("engine", "device", "torch"):
            rows[key] = [str(member.history.start.get(key, "-")) for member in firsts]
        return [(key, values) for key, values in rows.items() if len(set(values) - {"-"}) > 1]

    @cached_property
    def budgets(self) -> dict[str, float]:
        """The largest cost of each kind at which all configs have been evaluated; without kinds that a run lacks."""
        compared = [member for group in self.groups for member in group.compared]
        return {
            axis: min(member.evaluated[axis][0][-1] for member in compared)
            for axis in COSTS
            if all(axis in member.evaluated for member in compared)
        }

    def notes(self) -> list[str]:
        """What a reader must know before comparing, as sentences; the most important first."""
        return [*_other_data(self.members), *_unfinished(self.members), *_lengths(self), *_times(self), *_seeds(self)]


def labels(folders: Sequence[Path]) -> list[str]:
    """Names of folders, with as many of the folders above them as tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({path[-depth:] for path in paths}) < len(paths):
        depth += 1
    found: list[str] = []
    for path in paths:
        name = readable("/".join(path[-depth:]).lstrip("/"))
        found.append(name if name not in found else f"{name[: LONGEST - 6]} ({len(found) + 1})")
    return found


def readable(text: str, longest: int = LONGEST) -> str:
    """A text for one line of a table: printable, and of at most ``longest`` characters."""
    clean = "".join(sign if sign.isprintable() else "\ufffd" for sign in text)
    return clean if len(clean) <= longest else f"{clean[: longest - 12]}\u2026{clean[-11:]}"


def grouped(members: Sequence[Member]) -> list[Group]:
    """Group runs whose settings are equal but for the seed and what changes nothing, in the order of their first."""
    # Other versions of the program may have other settings.
    configs = [{*member.settings} for member in members if member.settings]
    known = set.intersection(*configs) if configs else set()
    found: dict[str, list[Member]] = {}
    for member in members:
        what = {key: value for key, value in member.settings.items() if key in known and not key.startswith(IGNORED)}
        start = member.history.start
        place = [what, start.get("world_size"), start.get("device"), member.data]
        key = json.dumps(place, sort_keys=True, default=str) if what else str(member.run.folder)
        found.setdefault(key, []).append(member)
    names = [_common_label(each) for each in found.values()]
    count = Counter(names)
    return [
        Group(name if count[name] == 1 else each[0].label, each)
        for name, each in zip(names, found.values(), strict=True)
    ]


def _common_label(members: list[Member]) -> str:
    """The name of a group: what the names of its runs begin with, or else the first of them."""
    if len(members) == 1:
        return members[0].label
    names = {member.run.name for member in members}
    if len(names) == 1 and (name := readable(names.pop()).strip()):
        return name
    letters = takewhile(lambda each: len({*each}) == 1, zip(*(member.label for member in members), strict=False))
    prefix = re.sub(r"([\W_]+(seed|s)?[\W_]*\d*|\d+|^seed)$", "", "".join(each[0] for each in letters))
    return prefix or f"{members[0].label[: LONGEST - 12]} and {len(members) - 1} more"


def _names(members: Iterable[Member]) -> str:
    names = [member.label for member in members]
    return ", ".join(names) if len(names) < 5 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _other_data(members: Sequence[Member]) -> list[str]:
    kinds: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        kinds.setdefault(member.data, []).append(member)
    if len(kinds) < 2:
        return []
    _, *others = sorted(kinds.values(), key=len, reverse=True)
    apart = [member for each in others for member in each]
    text = f"{_names(apart)}: other data, tokenizer or block length than the others, so the losses are not comparable"
    if all(member.history.bits_per_byte is not None for member in members):
        text += "; bits per byte are, if the validation text is the same"
    return [f"{text}."]


def _unfinished(members: Sequence[Member]) -> list[str]:
    found = []
    for member in members:
        if not member.ended:
            found.append(f"{member.label} at step {member.history.last_step:,}{member.history.goal}")
    if not found:
        return []
    names = "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")
    return [f"Not finished: {names}. Means are over finished runs where a config has any."]


def _lengths(comparison: Comparison) -> list[str]:
    lengths = {group.label: group.mean(lambda member: member.history.tokens) for group in comparison.groups}
    known = [tokens for tokens in lengths.values() if tokens]
    if not known or max(known) <= 1.01 * min(known):
        return []
    return ["The runs were trained on different numbers of tokens: compare them at equal cost, not at their ends."]


def _processes(member: Member) -> str:
    """Numbers of processes that a run had, one after the other."""
    history = member.history
    sizes = [str(record.get("world_size", "-")) for record in (history.start, *history.resumes)]
    return ", then ".join(size for size, before in zip(sizes, ["", *sizes], strict=False) if size != before)


def _times(comparison: Comparison) -> list[str]:
    members = [member for group in comparison.groups for member in group.members]
    figures: dict[str, list[str]] = {"number of processes": [_processes(member) for member in members]}
    for key in ("engine", "device"):
        figures[key] = [str(member.history.start.get(key, "-")) for member in members]
    differ = [name for name, values in figures.items() if len({*values} - {"-"}) > 1]
    if not differ:
        return []
    return [f"The runs differ in {' and '.join(differ)}, so their times and throughputs are not comparable."]


def _seeds(comparison: Comparison) -> list[str]:
    single = [group.label for group in comparison.groups if len(group.values(lambda member: member.loss)) == 1]
    if len(single) == len(comparison.groups):
        return ["One seed each: a difference may be chance."]
    found = [f"One seed only: {', '.join(single)}; a difference may be chance."] if single else []
    ranked = sorted(
        (values for group in comparison.groups if (values := group.values(lambda member: member.loss))), key=fmean
    )
    if len(ranked) > 1 and min(len(each) for each in ranked[:2]) > 1 and max(ranked[0]) >= min(ranked[1]):
        found.append("The ranges of the two lowest losses overlap: these seeds do not tell them apart.")
    return found
