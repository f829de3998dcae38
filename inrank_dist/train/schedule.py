"""Learning rate schedules."""

import math
from typing import TYPE_CHECKING

from .settings import ScheduleSettings

if TYPE_CHECKING:
    from ..config import Config


def learning_rate(settings: ScheduleSettings, peak: float, step: int, steps: int) -> float:
    """Return the learning rate of the next optimizer step.

    The warmup is linear and reaches the peak at step ``warmup_steps``. The schedules cosine, linear and wsd decay to
    ``min_lr_ratio * peak`` after the last step. wsd (warmup, stable, decay) is constant after the warmup and decays
    linearly over the last ``decay_fraction`` of the steps.

    Args:
        settings: settings of the schedule.
        peak: peak learning rate.
        step: number of completed optimizer steps.
        steps: number of optimizer steps of the whole run.
    """
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.name == "constant":
        return peak
    begin = decay_begins(settings, steps)
    done = max(0.0, (step - begin) / max(steps - begin, 1))
    share = (1 + math.cos(math.pi * done)) / 2 if settings.name == "cosine" else 1 - done
    return peak * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * share)


def planned_rate(config: "Config", name: str, step: int, *, factored: bool) -> float:
    """Return the learning rate of the next optimizer step of a run.

    Args:
        config: the configuration of the run.
        name: ``lr`` or ``matrix_lr``, the setting of the optimizer with the peak.
        step: number of completed optimizer steps.
        factored: whether any layer is low-rank by now, for ``factorized_lr_scale``.
    """
    rate = learning_rate(config.schedule, getattr(config.optimizer, name), step, config.train.steps)
    return rate * config.lowrank.lr_scale(factored=factored)


def decay_begins(settings: ScheduleSettings, steps: int) -> int:
    """Return the number of completed steps after which the learning rate begins to decay."""
    if settings.name == "wsd":
        return max(settings.warmup_steps, steps - round(settings.decay_fraction * steps))
    return settings.warmup_steps
