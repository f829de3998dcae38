"""The low-rank linear layer."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["none", "silu"]


class LowRankLinear(nn.Module):
    """``y = a * x @ W0.T + f(x @ V) @ U.T + bias`` with factors ``U: (out, R)`` and ``V: (in, R)``.

    Both factors have their long dimension first, so that sharding the first dimension never cuts the rank dimension and
    a change of rank acts on the rows that a process holds.

    Args:
        in_features, out_features: sizes of ``x`` and ``y``.
        modes: ``R``, the number of columns of both factors.
        bias: whether there is a bias ``(out,)``.
        base: whether there is a dense base ``W0: (out, in)``. It takes no gradient; ``a`` is ``base_scale``.

    The parameters are left uninitialised (``lowrank.init`` says how factors start).

    Attributes:
        joins: whether ``forward_together`` runs this layer with others as one product.
        activation: ``f``; none: the identity.
    """

    base: nn.Parameter | None
    bias: nn.Parameter | None
    base_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        modes: int,
        *,
        bias: bool = True,
        base: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.modes = in_features, out_features, modes
        self.joins = True
        self.activation: Activation = "none"
        self.U = nn.Parameter(torch.empty(out_features, modes, device=device, dtype=dtype))
        self.V = nn.Parameter(torch.empty(in_features, modes, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.base = None
        scale = None
        if base:
            self.base = nn.Parameter(
                torch.empty(out_features, in_features, device=device, dtype=dtype), requires_grad=False
            )
            # A tensor, not a number: torch.compile would compile again for every new value of a Python float.
            scale = torch.ones((), device=device)
        self.register_buffer("base_scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x: (..., in)`` to ``(..., out)``."""
        return self._finish(x, x @ self.V)

    def _finish(self, x: Tensor, inner: Tensor) -> Tensor:
        """The output from ``x`` and ``x @ V``."""
        if self.activation == "silu":
            inner = F.silu(inner)
        y = F.linear(inner, self.U, self.bias)
        if self.base is not None and self.base_scale is not None:
            y = y + self.base_scale * F.linear(x, self.base)
        return y

    @staticmethod
    def forward_together(layers: "Sequence[LowRankLinear]", x: Tensor) -> list[Tensor]:
        """Outputs of layers that read the same ``x: (..., in)``; their ``x @ V`` are one product.

        So ``x`` is read once, and its gradient is one product instead of a sum of several. The factors stay parameters
        of their own, which engines, rank events and checkpoints know; putting them side by side copies ``in * sum R``
        numbers, nothing beside a product with many rows of ``x``. On two CPU cores that buys nothing that could be
        measured (1.00 to 1.01 in five shapes, README); it is made for GPUs and not measured there.
        """
        if not all(layer.joins for layer in layers):
            return [layer(x) for layer in layers]
        joined = torch.cat([layer.V.to(_compute_dtype(x)) for layer in layers], dim=1)
        inner = (x @ joined).split([layer.V.shape[1] for layer in layers], dim=-1)
        return [layer._finish(x, part) for layer, part in zip(layers, inner, strict=True)]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, modes={self.modes}, "
            f"bias={self.bias is not None}, base={self.base is not None}"
        )


def _compute_dtype(x: Tensor) -> torch.dtype:
    """In which a product with ``x`` is computed; put together in it, factors are not copied twice."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def set_joining(model: nn.Module, joins: bool) -> None:
    """Whether layers that read the same input run as one product."""
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.joins = joins


def set_activation(model: nn.Module, activation: Activation) -> None:
    """What lies between the factors of every layer."""
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.activation = activation


def set_base_scale(model: nn.Module, scale: float) -> None:
    """Set ``a`` of every layer that has a base, in place."""
    for module in model.modules():
        if isinstance(module, LowRankLinear) and module.base_scale is not None:
            module.base_scale.fill_(scale)
