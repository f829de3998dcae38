"""The low-rank linear layer."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer import LayerKind, LowRankLayer


class LowRankLinear(LowRankLayer):
    """A linear layer ``y = a * x @ W0.T + f(x @ V) @ U.T + bias`` with the activation ``f`` (the identity by default).

    Args:
        in_features, out_features: sizes of ``x`` and ``y``.
        modes, bias, base: see ``LowRankLayer``.
    """

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
        super().__init__((out_features, in_features), modes, bias=bias, base=base, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features

    def read(self, x: Tensor) -> Tensor:
        """Map ``x: (..., in)`` to ``(..., R)``."""
        return x @ self.V

    def write(self, inner: Tensor) -> Tensor:
        """Map ``(..., R)`` to ``(..., out)``."""
        return F.linear(inner, self.U, self.bias)

    def through_base(self, x: Tensor) -> Tensor:
        """Map ``x: (..., in)`` to ``(..., out)``."""
        assert self.base is not None
        return F.linear(x, self.base)

    @staticmethod
    def forward_fused(layers: "Sequence[LowRankLinear]", x: Tensor) -> list[Tensor]:
        """Compute the outputs of layers that read the same input ``x: (..., in)``, with one product for all ``x @ V``.

        ``x`` is read once, and its gradient is one product instead of a sum of several. The factors remain separate
        parameters. Concatenating them copies ``in * sum R`` elements, which is negligible if ``x`` has many rows.

        If any layer has ``fused`` False, each layer is called by itself.
        """
        if not all(layer.fused for layer in layers):
            return [layer(x) for layer in layers]
        joined = torch.cat([layer.V.to(_compute_dtype(x)) for layer in layers], dim=1)
        inner = (x @ joined).split([layer.V.shape[1] for layer in layers], dim=-1)
        return [layer._finish(x, part) for layer, part in zip(layers, inner, strict=True)]

    def _sizes(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which autocast computes a product with ``x``.

    Factors are cast to it before they are concatenated, so autocast does not copy them a second time.
    """
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


class LinearKind(LayerKind[nn.Linear]):
    """``nn.Linear``, whose weight is the matrix."""

    dense = nn.Linear

    def shape(self, module: nn.Linear) -> tuple[int, int]:
        return module.out_features, module.in_features

    def make(self, module: nn.Linear, modes: int, base: bool) -> LowRankLinear:
        bias, dtype = module.bias is not None, module.weight.dtype
        out, in_ = self.shape(module)
        return LowRankLinear(in_, out, modes, bias=bias, base=base, device="meta", dtype=dtype)

    def refusal(self, module: nn.Linear) -> str | None:
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "belongs to an nn.MultiheadAttention, which reads its weight without calling it"
        return super().refusal(module)
