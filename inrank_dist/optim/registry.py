"""Registry of the optimizers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from .matrices import FactorMaps
from .orthogonal import lora_muon_maps, spectron_maps

if TYPE_CHECKING:
    from .settings import OptimizerSettings


Matrices = Literal["none", "dense", "factors"]
"""Which parameters of the blocks get orthogonalised updates."""


@dataclass(frozen=True)
class OptimizerEntry:
    """Description of an optimizer. A new optimizer is an instance of this class and a line in ``OPTIMIZERS``.

    Attributes:
        elementwise: class that trains all parameters if ``matrices`` is ``none``. Otherwise
            ``matrices.MatrixOptimizer`` trains the model, and uses AdamW for parameters that are not matrices.
        arguments: returns the keyword arguments of ``elementwise``, except the parameter groups.
        moments: returns the names of the moments of each parameter. Each name needs an entry in ``STATE_MAPS``.
        counts_steps: whether the state of each parameter has a ``step``, as in Adam.
        native_arguments: further keyword arguments, not used with DeepSpeed.
        matrices: which parameters of the blocks get orthogonalised updates. ``none``; ``dense``: the weights of dense
            layers; ``factors``: the weights of dense layers, and pairs of factors.
        maps: update rule of the factors, see ``matrices.FactorMaps``.
    """

    elementwise: type[torch.optim.Optimizer]
    arguments: Callable[["OptimizerSettings"], dict[str, Any]]
    moments: Callable[["OptimizerSettings"], tuple[str, ...]]
    counts_steps: bool = False
    native_arguments: Mapping[str, Any] = field(default_factory=dict)
    matrices: Matrices = "none"
    maps: FactorMaps | None = None


def _adam_arguments(settings: "OptimizerSettings") -> dict[str, Any]:
    return {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}


def _adam(matrices: Matrices = "none", maps: FactorMaps | None = None) -> OptimizerEntry:
    return OptimizerEntry(
        torch.optim.AdamW,
        _adam_arguments,
        lambda settings: ("exp_avg", "exp_avg_sq"),
        True,
        # The fused implementation is faster. DTensor does not support the one of SGD.
        {"fused": True},
        matrices,
        maps,
    )


OPTIMIZERS: dict[str, OptimizerEntry] = {
    "adamw": _adam(),
    "sgd": OptimizerEntry(
        torch.optim.SGD,
        lambda settings: {"lr": settings.lr, "momentum": settings.beta1},
        lambda settings: ("momentum_buffer",) if settings.beta1 > 0 else (),  # SGD without momentum has no state
    ),
    "muon": _adam("dense"),
    "spectron": _adam("factors", spectron_maps),
    "lora_muon": _adam("factors", lora_muon_maps),
}
"""Optimizers by ``optimizer.name``."""
