"""The schedule of rank events."""

from dataclasses import dataclass
from typing import Literal

Action = Literal["check", "factorise", "grow", "freeze"]
"""``check``: measure the stable ranks of dense layers, and factorise or freeze if they have settled."""


@dataclass(frozen=True)
class RankPolicy:
    """The schedule of rank events, in optimizer steps (not forward passes).

    Attributes:
        interval: steps between two decisions. None if the rank never changes.
        freeze_step: latest step at which the rank is frozen. None if it may grow to the end.
        decay_steps: number of steps over which the base scale ``a`` decays linearly from 1 to 0. None without a
            decaying base.
        patience: number of consecutive decisions without growth after which the rank is frozen early. None: only
            ``freeze_step`` freezes it. The rank is not frozen before the base has decayed, because the frozen factors
            could not grow to replace the rest of the base.
        dense_steps: number of steps after which dense layers are factorised. 0 if they start as factors.
        check_interval: steps between two measurements of the stable ranks of dense layers, which are factorised before
            ``dense_steps`` once the ranks have settled. None: not measured.
    """

    interval: int | None
    freeze_step: int | None
    decay_steps: int | None
    patience: int | None = None
    dense_steps: int = 0
    check_interval: int | None = None

    def action(self, step: int, checks_without_growth: int = 0, *, dense: bool = False) -> Action | None:
        """Return the action due after ``step`` optimizer steps, or None. The rank must not be frozen yet.

        Args:
            step: number of completed optimizer steps.
            checks_without_growth: number of consecutive decisions, up to now, in which no layer grew.
            dense: whether the layers are dense. They can still be dense after the scheduled step if the run was resumed
                with a smaller ``dense_steps``.
        """
        if not step:
            return None
        if self.freeze_step is not None and step >= self.freeze_step:
            return "freeze"
        if dense:
            if step >= self.dense_steps:
                return "factorise"
            return "check" if self.check_interval and step % self.check_interval == 0 else None
        if not self.interval or step % self.interval:
            return None
        is_settled = self.patience is not None and checks_without_growth >= self.patience
        return "freeze" if is_settled and step >= (self.decay_steps or 0) else "grow"

    def base_scale(self, step: int) -> float:
        """Return the base scale ``a`` for the forward passes that follow ``step`` completed steps."""
        if self.decay_steps is None:
            return 1.0
        return max(0.0, 1.0 - step / self.decay_steps)

    def removes_base(self, step: int) -> bool:
        """Return whether the base has decayed to zero after ``step`` optimizer steps."""
        return self.decay_steps is not None and step >= self.decay_steps
