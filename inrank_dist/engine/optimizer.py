"""The optimizer: its settings, its parameter groups, and how its moments follow a rank event."""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..lowrank.event import RankEvent, map_first_moment, map_second_moment

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""Optimizer -> what it remembers of each parameter, under torch's names."""

MomentRule = Literal["transport", "slice", "reset"]


@dataclass(kw_only=True)
class OptimizerSettings:
    """The optimizer. Norms, biases and embeddings take no weight decay."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd with momentum beta1 (weight decay is then L2). Others are refused: a rank event must know how their
    moments move."""
    lr: float = 6e-4
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices."""
    beta1: float = 0.9
    """Decay rate of the first moment; for sgd the momentum."""
    beta2: float = 0.95
    """Decay rate of the second moment (adamw)."""
    eps: float = 1e-8
    """Added to the square root of the second moment (adamw)."""
    moments_on_event: MomentRule = "transport"
    """What becomes of the moments of factors at a rank event: transport moves them with the maps; slice keeps the first
    columns, as the published code does; reset starts from zero."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if not getattr(self, name) > 0:
                raise UserError(
                    f"optimizer.{name} is {getattr(self, name)}; write a positive number such as 6e-4 (lr) or "
                    "1e-8 (eps)"
                )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; write a number from 0 to below 1")
        if not self.weight_decay >= 0:
            raise UserError(f"optimizer.weight_decay is {self.weight_decay}; write 0 or a positive number")

    @property
    def moments(self) -> tuple[str, ...]:
        """What it remembers of each parameter; SGD without momentum nothing."""
        return () if self.name == "sgd" and self.beta1 == 0 else MOMENTS[self.name]


def decayed_parameters(model: nn.Module, *, factors: bool) -> set[str]:
    """Names of the parameters that take weight decay.

    Args:
        factors: False where the factors have a decay of their own (``lowrank.frobenius_decay``).
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2
        and id(parameter) not in embeddings
        and (factors or name.rpartition(".")[2] not in ("U", "V"))
    }


def build_optimizer(
    kind: Callable[..., torch.optim.Optimizer],
    parameters: Mapping[str, nn.Parameter],
    decayed: Set[str],
    settings: OptimizerSettings,
) -> torch.optim.Optimizer:
    """The optimizer over the parameters that take gradients, in two groups: with and without weight decay.

    Args:
        kind: makes it, as ``torch.optim.AdamW`` or ``torch.optim.SGD`` do.
        decayed: names of those that take weight decay.
    """
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    decays = [parameter for name, parameter in trained.items() if name in decayed]
    plain = [parameter for name, parameter in trained.items() if name not in decayed]
    groups = [
        {"params": decays, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return kind(groups, lr=settings.lr, momentum=settings.beta1)
    return kind(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps)


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
        moments: those of ``MOMENTS``, each ``(rows, R)``.
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
