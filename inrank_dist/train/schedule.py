"""Learning rate as a function of the step."""

import math

from .settings import ScheduleSettings


def learning_rate(settings: ScheduleSettings, peak: float, step: int, steps: int) -> float:
    """Learning rate of the optimizer step that follows ``step`` completed ones, of ``steps`` in all.

    Linear warm-up reaches the peak at step ``warmup_steps``; cosine, linear and wsd end at ``min_lr_ratio * peak``
    after the last step. wsd (warm-up, stable, decay) is linear over the last ``decay_fraction`` of the steps.
    """
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.name == "constant":
        return peak
    begin = decay_begins(settings, steps)
    done = max(0.0, (step - begin) / max(steps - begin, 1))
    share = (1 + math.cos(math.pi * done)) / 2 if settings.name == "cosine" else 1 - done
    return peak * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * share)


def decay_begins(settings: ScheduleSettings, steps: int) -> int:
    """Completed steps up to which the learning rate does not fall."""
    if settings.name == "wsd":
        return max(settings.warmup_steps, steps - round(settings.decay_fraction * steps))
    return settings.warmup_steps
