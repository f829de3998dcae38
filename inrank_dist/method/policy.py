"""When to look and what to do: pure decisions on step numbers."""

from dataclasses import dataclass
from typing import Literal

Action = Literal["factorise", "grow", "freeze"]


@dataclass(frozen=True)
class RankPolicy:
    """The calendar of rank events, in optimizer steps (never in forward passes).

    Attributes:
        interval: steps between decisions, or None: the rank never changes.
        freeze_step: after this many steps the rank is frozen at the latest, or None: it may grow to the end.
        decay_steps: the base's factor ``a`` goes linearly from 1 to 0 over this many steps, or None: no decaying base.
        patience: the rank is also frozen after this many decisions in a row in which no layer grew, or None. Not while
            the base fades: it would be left without its weight.
        dense_steps: dense layers are factorised after this many steps; 0: they start as factors.
    """

    interval: int | None
    freeze_step: int | None
    decay_steps: int | None
    patience: int | None = None
    dense_steps: int = 0

    def action(self, step: int, checks_without_growth: int = 0) -> Action | None:
        """What is due after ``step`` optimizer steps, as long as the rank is not frozen yet.

        Args:
            checks_without_growth: decisions in a row, up to now, in which no layer grew.
        """
        if self.freeze_step is not None and step >= self.freeze_step:
            return "freeze"
        if step <= self.dense_steps:
            return "factorise" if 0 < step == self.dense_steps else None
        if not self.interval or step % self.interval:
            return None
        is_settled = self.patience is not None and checks_without_growth >= self.patience
        return "freeze" if is_settled and step >= (self.decay_steps or 0) else "grow"

    def base_scale(self, step: int) -> float:
        """``a`` for the forward passes of the step that follows ``step`` completed ones."""
        if self.decay_steps is None:
            return 1.0
        return max(0.0, 1.0 - step / self.decay_steps)

    def removes_base(self, step: int) -> bool:
        """Whether the base is gone after ``step`` optimizer steps."""
        return self.decay_steps is not None and step >= self.decay_steps
