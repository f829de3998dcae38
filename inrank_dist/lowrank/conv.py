"""The low-rank 2D convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer import LayerKind, LowRankLayer

Pair = tuple[int, int]


class LowRankConv2d(LowRankLayer):
    """A convolution to ``R`` channels followed by a 1 x 1 convolution (Zhang et al., arXiv 1505.06798).

    The first convolution has the kernel size, stride, padding and dilation of the dense layer; the second adds the
    bias. They are equivalent to one convolution whose weight ``(out_channels, in_channels, kh, kw)``, flattened to
    ``(out, in)`` with ``in = in_channels * kh * kw``, is ``a * W0 + U @ V.T``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode: as in ``nn.Conv2d``, but sizes
            must be pairs. Groups are not supported.
        modes, bias, base: see ``LowRankLayer``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        modes: int,
        *,
        stride: Pair = (1, 1),
        padding: Pair | str = (0, 0),
        dilation: Pair = (1, 1),
        padding_mode: str = "zeros",
        bias: bool = True,
        base: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (out_channels, in_channels * kernel_size[0] * kernel_size[1])
        super().__init__(shape, modes, bias=bias, base=base, device=device, dtype=dtype)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation, self.padding_mode = stride, padding, dilation, padding_mode

    def read(self, x: Tensor) -> Tensor:
        """Map ``x: (N, in_channels, H, W)`` to ``(N, R, H', W')``; the batch dimension ``N`` is optional."""
        return self._convolve(x, self.V.T)

    def mix(self, inner: Tensor, core: Tensor) -> Tensor:
        """Map ``(N, R, H', W')`` to the same shape."""
        return F.conv2d(inner, core[:, :, None, None])

    def write(self, inner: Tensor) -> Tensor:
        """Map ``(N, R, H', W')`` to ``(N, out_channels, H', W')``."""
        return F.conv2d(inner, self.U[:, :, None, None], self.bias)

    def through_base(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        assert self.base is not None
        return self._convolve(x, self.base)

    def _convolve(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Convolve with the weight ``matrix: (channels, in)`` and the geometry of the dense layer."""
        kernel = matrix.unflatten(1, (self.in_channels, *self.kernel_size))
        if self.padding_mode == "zeros":
            return F.conv2d(x, kernel, None, self.stride, self.padding, self.dilation)
        return F.conv2d(F.pad(x, self._margins(), mode=self.padding_mode), kernel, None, self.stride, 0, self.dilation)

    def _margins(self) -> list[int]:
        """Return the padding for ``F.pad`` (left, right, top, bottom), used if ``padding_mode`` is not ``zeros``."""
        margins = []
        for axis in (1, 0):
            if isinstance(self.padding, str):
                total = self.dilation[axis] * (self.kernel_size[axis] - 1) if self.padding == "same" else 0
                margins += [total // 2, total - total // 2]
            else:
                margins += [self.padding[axis]] * 2
        return margins

    def _sizes(self) -> str:
        geometry = f"stride={self.stride}, padding={self.padding!r}, dilation={self.dilation}"
        mode = "" if self.padding_mode == "zeros" else f", padding_mode={self.padding_mode!r}"
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, {geometry}{mode}"


class Conv2dKind(LayerKind[nn.Conv2d]):
    """``nn.Conv2d`` with one group; its matrix is ``weight.flatten(1): (out_channels, in_channels * kh * kw)``."""

    dense = nn.Conv2d

    def shape(self, module: nn.Conv2d) -> tuple[int, int]:
        return module.out_channels, module.in_channels * module.kernel_size[0] * module.kernel_size[1]

    def make(self, module: nn.Conv2d, modes: int, base: bool) -> LowRankConv2d:
        return LowRankConv2d(
            module.in_channels,
            module.out_channels,
            _pair(module.kernel_size),
            modes,
            stride=_pair(module.stride),
            padding=module.padding if isinstance(module.padding, str) else _pair(module.padding),
            dilation=_pair(module.dilation),
            padding_mode=module.padding_mode,
            bias=module.bias is not None,
            base=base,
            device="meta",
            dtype=module.weight.dtype,
        )

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def restore(self, module: nn.Conv2d, matrix: Tensor) -> Tensor:
        return matrix.unflatten(1, module.weight.shape[1:])

    def refusal(self, module: nn.Conv2d) -> str | None:
        if module.groups != 1:
            return f"is a convolution with {module.groups} groups, which has no single matrix"
        return super().refusal(module)


def _pair(sizes: tuple[int, ...]) -> Pair:
    height, width = sizes
    return height, width
