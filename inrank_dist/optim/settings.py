"""Section ``optimizer``: which optimizer, and its rates."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from ..runtime.choices import OneOf
from ..runtime.errors import UserError
from ..runtime.resume import OnResume
from .registry import OPTIMIZERS, Matrices, OptimizerEntry

MomentRule = Literal["transport", "slice", "reset"]


def optimizers_of(matrices: Matrices) -> list[str]:
    """The optimizers that train these parameters as matrices."""
    return [name for name, entry in OPTIMIZERS.items() if entry.matrices == matrices]


@dataclass(kw_only=True)
class OptimizerSettings:
    """The optimizer. Norms, biases and embeddings take no weight decay."""

    ON_RESUME: ClassVar[OnResume] = OnResume(fixed=("name",))

    name: Annotated[str, OneOf(lambda: OPTIMIZERS)] = "adamw"
    """adamw; sgd with momentum beta1 (weight decay is then L2); muon orthogonalises the updates of the dense matrices
    of a full-rank model; spectron and lora_muon do that to factors, and to the dense matrices beside them. With the
    last three AdamW trains embeddings, norms, biases and the head. Not with ZeRO."""
    lr: float = 6e-4
    """Peak learning rate; with muon, spectron and lora_muon of what AdamW trains."""
    matrix_lr: float = 0.02
    """Peak learning rate of matrices and factors with muon, spectron and lora_muon."""
    momentum: float = 0.95
    """Decay rate of the momentum of matrices and factors with muon, spectron and lora_muon."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices. With spectron and lora_muon the product of two factors decays at this rate,
    with the others each factor."""
    beta1: float = 0.9
    """Decay rate of the first moment; for sgd the momentum."""
    beta2: float = 0.95
    """Decay rate of the second moment (adamw)."""
    eps: float = 1e-8
    """Added to the square root of the second moment (adamw)."""
    moments_on_event: MomentRule = "transport"
    """What becomes of the moments of factors at a rank event: transport moves them with the maps; slice keeps the first
    columns, as the published code does, but none where a dense weight becomes factors; reset starts from zero."""

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
        """Whether matrices get orthogonalised updates."""
        return self.entry.matrices != "none"

    @property
    def entry(self) -> OptimizerEntry:
        """What is known of the optimizer."""
        return OPTIMIZERS[self.name]

    @property
    def matrix_scale(self) -> float:
        """The learning rate of matrices and factors as a multiple of ``lr``."""
        return self.matrix_lr / self.lr if self.orthogonalises else 1.0
