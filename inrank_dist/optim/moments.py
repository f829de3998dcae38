"""What an optimizer remembers of each parameter, and how that follows a rank event."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..lowrank.division import AllReduce, sum_over_processes
from ..lowrank.event import RankEvent, map_first_moment, map_second_moment
from ..runtime.errors import UserError
from .groups import Role
from .settings import MomentRule, OptimizerSettings


def plain_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """What an optimizer remembers of a parameter that has not its shape, such as the number of steps."""
    state = optimizer.state.get(parameter, {})
    return {name: v for name, v in state.items() if not (torch.is_tensor(v) and v.shape == parameter.shape)}


def check_state(optimizer: torch.optim.Optimizer) -> bool:
    """Refuse an optimizer whose state cannot follow a rank event.

    An optimizer of the same class takes a step with a small matrix, to see what it remembers.

    Args:
        optimizer: one that wraps another as its attribute ``optimizer``, as accelerate's does, stands for that.

    Returns:
        Whether such a step could be taken.

    Raises:
        UserError: it remembers something for which there is no map.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    cls = type(optimizer)
    probe = torch.nn.Parameter(torch.ones(2, 3))
    accepted = inspect.signature(cls.__init__).parameters
    options = {key: value for key, value in optimizer.defaults.items() if key in accepted and key != "params"}
    if "fused" in options:
        options["fused"] = None
    try:
        twin = cls([probe], **options)
        probe.grad = torch.ones_like(probe)
        twin.step()
    except Exception:  # somebody's own class with other arguments: found out at the first event
        return False
    _refuse_unknown(cls, [name for name, value in twin.state[probe].items() if _is_moment(value, probe)])
    return True


def _refuse_unknown(cls: type, names: Iterable[str]) -> None:
    for name in names:
        if name not in STATE_MAPS:
            raise UserError(
                f"{cls.__name__} keeps {name!r} of each parameter, which cannot follow a change of rank; write an "
                f"optimizer that keeps {', '.join(STATE_MAPS)}, or add a map to inrank_dist.optim.moments.STATE_MAPS"
            )


def _is_moment(value: object, parameter: Tensor) -> bool:
    return torch.is_tensor(value) and value.ndim > 0


def moment_names(settings: OptimizerSettings, role: Role) -> tuple[str, ...]:
    """Names, which are torch's, of what is remembered of a parameter of this role."""
    if role != "plain":
        return ("momentum_buffer",)
    return settings.entry.moments(settings)


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
    return {name: STATE_MAPS[name](event, factor, name, moments, step, betas) for name in moments}


def _first(
    event: RankEvent, factor: str, name: str, moments: Mapping[str, Tensor], step: float, betas: tuple[float, float]
) -> Tensor:
    other = event.M if factor == "U" else event.N
    return map_first_moment(event, moments[name], other)


def _second(
    event: RankEvent, factor: str, name: str, moments: Mapping[str, Tensor], step: float, betas: tuple[float, float]
) -> Tensor:
    return map_second_moment(event, moments["exp_avg"], moments[name], factor, step=step, betas=betas)


StateMap = Callable[[RankEvent, str, str, Mapping[str, Tensor], float, tuple[float, float]], Tensor]
"""Event, factor (``U`` or ``V``), name, all moments of the factor, steps so far and Adam's betas -> the moment after
the event, ``(rows, modes)``."""

STATE_MAPS: dict[str, StateMap] = {"exp_avg": _first, "momentum_buffer": _first, "exp_avg_sq": _second}
"""Optimizer state, by torch's name -> how it follows a rank event. An optimizer with other state adds its own here."""


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
