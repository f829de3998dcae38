"""The low-rank linear layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """``y = a * x @ W0.T + (x @ V) @ U.T + bias`` with factors ``U: (out, R)`` and ``V: (in, R)``.

    Both factors have their long dimension first, so that sharding the first dimension never cuts the rank dimension and
    a change of rank acts on the rows that a process holds (METHOD section 3).

    Args:
        in_features, out_features: sizes of ``x`` and ``y``.
        modes: ``R``, the number of columns of both factors.
        bias: whether there is a bias ``(out,)``.
        base: whether there is a dense base ``W0: (out, in)``. It takes no gradient; ``a`` is ``base_scale``.

    The parameters are left uninitialised (``lowrank.init`` says how factors start).
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
        y = F.linear(x @ self.V, self.U, self.bias)
        if self.base is not None and self.base_scale is not None:
            y = y + self.base_scale * F.linear(x, self.base)
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, modes={self.modes}, "
            f"bias={self.bias is not None}, base={self.base is not None}"
        )


def set_base_scale(model: nn.Module, scale: float) -> None:
    """Set ``a`` of every layer that has a base, in place."""
    for module in model.modules():
        if isinstance(module, LowRankLinear) and module.base_scale is not None:
            module.base_scale.fill_(scale)
