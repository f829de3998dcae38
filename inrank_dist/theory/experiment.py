"""What an experiment of the laboratory is, and what it finds: claims with their measured values, plots, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, SupportsFloat, TypeVar

from ..report.history import Points
from ..report.plot import Plot

Cell = str | int | float | None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published or derived statement, held against a measured value.

    Attributes:
        name: key in ``result.json``.
        statement: what is measured.
        measured: the value. Over several seeds, the one that is worst for the claim.
        least: the claim holds from this value on; None: no lower limit.
        most: the claim holds up to this value; None: no upper limit.
    """

    name: str
    statement: str
    measured: float
    least: float | None = None
    most: float | None = None

    @property
    def holds(self) -> bool:
        """Whether ``least <= measured <= most``. False for nan."""
        above = self.least is None or self.measured >= self.least
        return above and (self.most is None or self.measured <= self.most) and self.measured == self.measured

    @property
    def expected(self) -> str:
        """The limits in words."""
        if self.least is None or self.most is None:
            sign, limit = ("≤", self.most) if self.least is None else ("≥", self.least)
            return f"{sign} {limit:.7g}"
        return f"{self.least:.7g}" if self.least == self.most else f"{self.least:.4g} to {self.most:.4g}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table. Columns whose first value is text are aligned to the left, the others to the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an experiment found.

    Attributes:
        claims: what was to be shown, and whether it was.
        notes: sentences needed to interpret the numbers, contradictions to the source among them.
    """

    claims: Sequence[Claim]
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


def curve(x: Iterable[SupportsFloat], y: Iterable[SupportsFloat]) -> Points:
    """The points of a line."""
    return [(float(a), float(b)) for a, b in zip(x, y, strict=True)]


class Progress:
    """Reports how far an experiment is.

    Args:
        report: receives an activity, how much of it is done, and its total, or None if that is unknown.
    """

    def __init__(self, report: Callable[[str, float, float | None], object] = lambda *_: None) -> None:
        self._report = report

    def __call__(self, activity: str, done: float = 0.0, total: float | None = None) -> None:
        """Report an activity, and how much of it is done."""
        self._report(activity, done, total)


S = TypeVar("S")


@dataclass(frozen=True, kw_only=True)
class Experiment(Generic[S]):
    """An entry of the registry.

    Attributes:
        title: for lists.
        summary: what is done and what is to be seen, in a few sentences.
        formulas: the mathematics, one formula a line.
        source: where it was published.
        settings: sizes, rates and ``seeds``: a frozen dataclass.
        run: does the experiment.
    """

    title: str
    summary: str
    formulas: Sequence[str]
    source: str
    settings: S
    run: Callable[[S, Progress], Result]


@dataclass(frozen=True)
class Finished:
    """A result with what is needed to repeat it."""

    name: str
    experiment: Experiment[Any]
    settings: Any
    result: Result
    seconds: float
    machine: dict[str, Any] = field(default_factory=dict)
