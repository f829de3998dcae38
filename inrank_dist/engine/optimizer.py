"""AdamW: its settings, its parameter groups, and how its moments follow a rank event."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..lowrank.event import RankEvent, map_first_moment, map_second_moment

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(kw_only=True)
class OptimizerSettings:
    """AdamW. Norms, biases and embeddings take no weight decay."""

    lr: float = 6e-4
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices."""
    beta1: float = 0.9
    """Decay rate of the first moment."""
    beta2: float = 0.95
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""

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


def build_optimizer(model: nn.Module, settings: OptimizerSettings, *, decay_factors: bool) -> torch.optim.AdamW:
    """AdamW over the parameters of ``model`` that take gradients, in two groups: with and without weight decay.

    Args:
        decay_factors: False where the factors have a decay of their own (``lowrank.frobenius_decay``).
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_factor = name.rpartition(".")[2] in ("U", "V")
        decays = parameter.ndim >= 2 and id(parameter) not in embeddings and (decay_factors or not is_factor)
        (decayed if decays else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def map_moments(
    event: RankEvent, factor: str, moments: Mapping[str, Tensor], *, step: float, betas: tuple[float, float]
) -> dict[str, Tensor]:
    """Moments of one factor after a rank event, from the rows that this process holds.

    Args:
        factor: ``U`` or ``V``; the moments of one move with the map of the other.
        moments: ``exp_avg`` and ``exp_avg_sq``, each ``(rows, R)``.
        step: optimizer steps so far.
    """
    other = event.M if factor == "U" else event.N
    first, second = (moments[name] for name in MOMENTS)
    return {
        "exp_avg": map_first_moment(event, first, other),
        "exp_avg_sq": map_second_moment(event, first, second, other, step=step, betas=betas),
    }
