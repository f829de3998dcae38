"""Settings of the optimizer (YAML section ``optimizer``)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from ..runtime.choices import OneOf
from ..runtime.errors import UserError
from ..runtime.resume import OnResume
from .registry import OPTIMIZERS, Matrices, OptimizerEntry

MomentRule = Literal["transport", "slice", "reset"]


def optimizers_of(matrices: Matrices) -> list[str]:
    """Return the names of the optimizers that orthogonalise the updates of these parameters."""
    return [name for name, entry in OPTIMIZERS.items() if entry.matrices == matrices]


@dataclass(kw_only=True)
class OptimizerSettings:
    """The optimizer. Weight decay does not apply to norms, biases and embeddings."""

    ON_RESUME: ClassVar[OnResume] = OnResume(fixed=("name",))

    name: Annotated[str, OneOf(lambda: OPTIMIZERS)] = "adamw"
    """adamw; sgd: momentum beta1, and weight decay is an L2 penalty; muon: orthogonalised updates of the dense matrices
    of a full-rank model; spectron and lora_muon: orthogonalised updates of the factors and of the remaining dense
    matrices. With muon, spectron and lora_muon, AdamW trains embeddings, norms, biases and the head. These three do not
    support ZeRO."""
    lr: float = 6e-4
    """Peak learning rate. With muon, spectron and lora_muon, it applies to the parameters that AdamW trains."""
    matrix_lr: float = 0.02
    """Peak learning rate of matrices and factors (muon, spectron, lora_muon)."""
    momentum: float = 0.95
    """Decay rate of the momentum of matrices and factors (muon, spectron, lora_muon)."""
    weight_decay: float = 0.1
    """Weight decay of matrices, decoupled except with sgd. With spectron and lora_muon, the product of two factors
    decays at this rate. With the other optimizers, each factor does."""
    beta1: float = 0.9
    """Decay rate of AdamW's first moment. With sgd, the momentum."""
    beta2: float = 0.95
    """Decay rate of AdamW's second moment."""
    eps: float = 1e-8
    """Added to the square root of AdamW's second moment."""
    moments_on_event: MomentRule = "transport"
    """How the moments of factors change at a rank event. transport: map them as the factors are mapped; slice: keep the
    first columns, as the published code does, or start from zero if a dense weight becomes factors; reset: start from
    zero."""

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise UserError(f"optimizer.name is {self.name}; write one of {', '.join(OPTIMIZERS)}")
        for name in ("lr", "matrix_lr", "eps"):
            if not getattr(self, name) > 0:
                raise UserError(
                    f"optimizer.{name} is {getattr(self, name)}; write a positive number such as 6e-4 (lr), "
                    "0.02 (matrix_lr) or 1e-8 (eps)"
                )
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; write a number from 0 to below 1")
        if not self.weight_decay >= 0:
            raise UserError(f"optimizer.weight_decay is {self.weight_decay}; write 0 or a positive number")

    @property
    def orthogonalises(self) -> bool:
        """Whether the optimizer orthogonalises the updates of matrices."""
        return self.entry.matrices != "none"

    @property
    def entry(self) -> OptimizerEntry:
        """Description of the optimizer."""
        return OPTIMIZERS[self.name]

    @property
    def matrix_scale(self) -> float:
        """Learning rate of matrices and factors as a multiple of ``lr``."""
        return self.matrix_lr / self.lr if self.orthogonalises else 1.0
