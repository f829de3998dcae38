"""Optimizer state per parameter, and how it is mapped at a rank event."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..lowrank.cores import map_core_first_moment, map_core_second_moment
from ..lowrank.division import AllReduce, sum_over_processes
from ..lowrank.event import RankEvent, fresh_share, map_first_moment, map_second_moment
from ..lowrank.layer import core_index
from ..runtime.errors import UserError
from .groups import Role
from .settings import MomentRule, OptimizerSettings


def plain_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """Return the optimizer state of a parameter that does not have the parameter's shape, such as the step count."""
    state = optimizer.state.get(parameter, {})
    return {name: v for name, v in state.items() if not (torch.is_tensor(v) and v.shape == parameter.shape)}


def check_state(optimizer: torch.optim.Optimizer) -> bool:
    """Check that the state of an optimizer can be mapped at a rank event.

    An optimizer of the same class takes one step on a small matrix, which shows the names of its state.

    Args:
        optimizer: the optimizer. A wrapper with the attribute ``optimizer``, such as accelerate's, is unwrapped.

    Returns:
        Whether the step succeeded. If it failed, nothing was checked.

    Raises:
        UserError: if the optimizer keeps state that is not in ``STATE_MAPS``.
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
    except Exception:  # a custom class with other arguments, which is checked at the first event
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
    """Return the names of the moments of a parameter with this role, as in the state dict of ``torch.optim``."""
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
    """Map this process's rows of the moments of one factor at a rank event. Those of a core must be whole.

    Args:
        event: the rank event of the layer.
        factor: ``U``, ``V`` or the name of a core. The gradient of ``U`` is mapped with the matrix of ``V``, and that
            of ``V`` with the matrix of ``U``.
        moments: moments by name, each ``(rows, R)``.
        step: number of optimizer steps taken.
        betas: decay rates of Adam, for bias correction.
        rule: ``transport`` maps the moments with the event. ``slice`` keeps the first columns and ``reset`` keeps none,
            and both fill the other columns with zeros. They are baselines for ``transport``.

    Returns:
        Moments by name, each ``(rows, event.modes)``.
    """
    if rule != "transport":
        kept = min(next(iter(moments.values())).shape[1], event.modes) if rule == "slice" else 0
        more = event.modes - kept
        if core_index(factor):
            return {name: torch.nn.functional.pad(m[:kept, :kept], (0, more, 0, more)) for name, m in moments.items()}
        return {name: torch.nn.functional.pad(moment[:, :kept], (0, more)) for name, moment in moments.items()}
    return {name: STATE_MAPS[name](event, factor, name, moments, step, betas) for name in moments}


def _first(
    event: RankEvent, factor: str, name: str, moments: Mapping[str, Tensor], step: float, betas: tuple[float, float]
) -> Tensor:
    if index := core_index(factor):
        assert event.cores is not None
        return map_core_first_moment(event.cores, index, event.fresh, moments[name])
    return map_first_moment(event, moments[name], event.gradient_map(factor))


def _second(
    event: RankEvent, factor: str, name: str, moments: Mapping[str, Tensor], step: float, betas: tuple[float, float]
) -> Tensor:
    first, second = moments["exp_avg"], moments[name]
    if index := core_index(factor):
        assert event.cores is not None
        corrections = [1 - beta**step for beta in betas]
        means = (first.double() / corrections[0], second.double() / corrections[1])
        mapped = map_core_second_moment(event.cores, index, event.fresh, *means, fresh_share(betas))
        return (mapped * corrections[1]).to(second.dtype)
    return map_second_moment(event, first, second, factor, step=step, betas=betas)


StateMap = Callable[[RankEvent, str, str, Mapping[str, Tensor], float, tuple[float, float]], Tensor]
"""Function of the event, the factor (``U``, ``V`` or a core), the name of the moment, all moments of the factor, the
number of steps taken and Adam's betas. It returns the moment after the event, ``(rows, modes)``."""

STATE_MAPS: dict[str, StateMap] = {"exp_avg": _first, "momentum_buffer": _first, "exp_avg_sq": _second}
"""Map of each kind of optimizer state, by its name in ``torch.optim``. Optimizers with other state add an entry."""


def moments_of_right_factor(
    moments: Mapping[str, Tensor],
    U: Tensor,
    all_reduce: AllReduce,
    *,
    step: float,
    betas: tuple[float, float],
) -> dict[str, Tensor]:
    """Compute the moments of ``V`` after a weight ``W`` has been factorised as ``U V^T``.

    The gradient of ``V`` is ``G^T U``, where ``G`` is the gradient of ``W``. The second moment is mapped as in
    ``map_second_moment``. All moments are summed in one all-reduce of ``8 in R`` bytes each.

    Args:
        moments: moments of ``W`` by name, each ``(rows, in)``. Each row is passed by exactly one process.
        U: the same rows of the new factor, ``(rows, R)``.
        all_reduce: sums a float64 tensor in place over all processes.
        step: number of optimizer steps taken.
        betas: decay rates of Adam, for bias correction.

    Returns:
        Unsharded moments by name, each ``(in, R)``, equal on all processes.
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
