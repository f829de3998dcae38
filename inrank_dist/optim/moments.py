"""What an optimizer remembers of each parameter, and how that follows a rank event."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..lowrank.division import AllReduce, sum_over_processes
from ..lowrank.event import RankEvent, map_first_moment, map_second_moment
from .groups import Kind
from .settings import MomentRule, OptimizerSettings


def moment_names(settings: OptimizerSettings, kind: Kind) -> tuple[str, ...]:
    """Names, which are torch's, of what is remembered of a parameter of a kind; SGD without momentum remembers
    nothing."""
    if kind != "plain":
        return ("momentum_buffer",)
    if settings.name == "sgd":
        return ("momentum_buffer",) if settings.beta1 > 0 else ()
    return ("exp_avg", "exp_avg_sq")


def map_moments(
    event: RankEvent,
    factor: str,
    moments: Mapping[str, Tensor],
    *,
    step: float,
    betas: tuple[float, float],
    rule: MomentRule = "transport",
) -> dict[str, Tensor]:
    """Moments of one factor after a rank event, from the rows that this process holds.

    Args:
        factor: ``U`` or ``V``; the moments of one move with the map of the other.
        moments: those of ``moment_names``, each ``(rows, R)``.
        step: optimizer steps so far.
        rule: ``slice`` and ``reset`` are there to measure what ``transport`` is worth; fresh columns start from zero in
            both.
    """
    if rule != "transport":
        kept = min(next(iter(moments.values())).shape[1], event.modes) if rule == "slice" else 0
        return {
            name: torch.nn.functional.pad(moment[:, :kept], (0, event.modes - kept)) for name, moment in moments.items()
        }
    other = event.M if factor == "U" else event.N
    mapped = {}
    for name, moment in moments.items():
        if name == "exp_avg_sq":
            mapped[name] = map_second_moment(event, moments["exp_avg"], moment, factor, step=step, betas=betas)
        else:
            mapped[name] = map_first_moment(event, moment, other)
    return mapped


def moments_of_right_factor(
    moments: Mapping[str, Tensor],
    U: Tensor,
    all_reduce: AllReduce,
    *,
    step: float,
    betas: tuple[float, float],
) -> dict[str, Tensor]:
    """Moments of ``V`` after a weight ``W`` has become ``U V^T``: its gradient is ``G^T U`` where that of ``W`` is
    ``G``.

    One all-reduce of ``8 in R`` bytes for each moment. The second moment follows as in ``map_second_moment``.

    Args:
        moments: of ``W``, each the rows ``(rows, in)`` that this process alone counts.
        U: the same rows of the new factor, ``(rows, R)``.
        step: optimizer steps so far.

    Returns:
        Whole moments, each ``(in, R)``, equal in every process.
    """
    U, sums = U.double(), []
    correction = {"exp_avg": 1 - betas[0] ** step, "exp_avg_sq": 1 - betas[1] ** step}
    means = {name: moment.double() / correction.get(name, 1.0) for name, moment in moments.items()}
    for name, mean in means.items():
        if name == "exp_avg_sq":
            sums.append((mean - means["exp_avg"].square()).T @ U.square())
        else:
            sums.append(mean.T @ U)
    mapped = dict(zip(means, sum_over_processes(sums, all_reduce), strict=True))
    if "exp_avg_sq" in mapped:
        mapped["exp_avg_sq"] = (mapped["exp_avg_sq"] + mapped["exp_avg"].square()).abs()
    return {name: (each * correction.get(name, 1.0)).to(moments[name].dtype) for name, each in mapped.items()}
