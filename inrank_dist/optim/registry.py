"""The optimizers by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from .matrices import FactorMaps
from .orthogonal import lora_muon_maps, spectron_maps

if TYPE_CHECKING:
    from .settings import OptimizerSettings


Matrices = Literal["none", "dense", "factors"]
"""Which parameters of the blocks are trained as matrices."""


@dataclass(frozen=True)
class OptimizerEntry:
    """What has to be known of an optimizer. A new one is an object of this class, and a line in ``OPTIMIZERS``.

    Attributes:
        elementwise: class that trains all parameters where ``matrices`` is ``none``. With orthogonalised updates AdamW
            trains what is no matrix (``matrices.MatrixOptimizer``).
        arguments: its keyword arguments beside the parameter groups, from the settings.
        moments: what it remembers of each parameter, from the settings; each name needs a map in ``STATE_MAPS``.
        counts_steps: whether it keeps ``step`` of each parameter, as Adam does.
        native_arguments: extra keyword arguments that are not passed under DeepSpeed.
        matrices: which parameters of the blocks are trained as matrices, with orthogonalised updates: of dense layers,
            of dense layers and as pairs of factors, or none.
        maps: the rule of the factors, see ``matrices.FactorMaps``.
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
        # The fused one takes 4 % off a step of GPT-2 small on CPU. Of SGD DTensor knows no fused one.
        {"fused": True},
        matrices,
        maps,
    )


OPTIMIZERS: dict[str, OptimizerEntry] = {
    "adamw": _adam(),
    "sgd": OptimizerEntry(
        torch.optim.SGD,
        lambda settings: {"lr": settings.lr, "momentum": settings.beta1},
        lambda settings: ("momentum_buffer",) if settings.beta1 > 0 else (),  # without momentum it remembers nothing
    ),
    "muon": _adam("dense"),
    "spectron": _adam("factors", spectron_maps),
    "lora_muon": _adam("factors", lora_muon_maps),
}
"""``optimizer.name`` -> optimizer."""
