"""What a low-rank layer is, and what has to be known of the dense layers that it can stand for."""

from typing import Any, Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["none", "silu"]
Dense = TypeVar("Dense", bound=nn.Module)


class LowRankLayer(nn.Module):
    """A layer that applies ``W = a * W0 + U @ V.T`` instead of a dense ``W: (out, in)``.

    Both factors have their long dimension first, so that sharding the first dimension never cuts the rank dimension and
    a change of rank acts on the rows that a process holds.

    A subclass says how the factors act on its input: ``read``, ``write`` and ``through_base``.

    Args:
        shape: ``(out, in)`` of the matrix.
        modes: ``R``, the number of columns of both factors.
        bias: whether there is a bias ``(out,)``.
        base: whether there is a dense base ``W0: (out, in)``. It takes no gradient; ``a`` is ``base_scale``.

    The parameters are left uninitialised (``lowrank.init`` says how factors start).

    Attributes:
        U, V: factors, ``(out, R)`` and ``(in, R)``.
        base_scale: ``a``, a float32 scalar that is not saved; None where there is no base.
        activation: what lies between the factors; none: the identity.
        fused: whether ``V`` of layers that read the same input are applied as one product.
    """

    bias: nn.Parameter | None
    base: nn.Parameter | None
    base_scale: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        modes: int,
        *,
        bias: bool = True,
        base: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.modes = shape, modes
        self.fused = True
        self.activation: Activation = "none"
        out, in_ = shape
        self.U = nn.Parameter(torch.empty(out, modes, device=device, dtype=dtype))
        self.V = nn.Parameter(torch.empty(in_, modes, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out, device=device, dtype=dtype)) if bias else None
        self.base = None
        scale = None
        if base:
            self.base = nn.Parameter(torch.empty(out, in_, device=device, dtype=dtype), requires_grad=False)
            # A tensor, not a number: torch.compile would compile again for every new value of a Python float.
            scale = torch.ones((), device=device)
        self.register_buffer("base_scale", scale, persistent=False)

    def read(self, x: Tensor) -> Tensor:
        """What ``V.T`` makes of the input."""
        raise NotImplementedError

    def write(self, inner: Tensor) -> Tensor:
        """What ``U`` makes of that, with the bias."""
        raise NotImplementedError

    def through_base(self, x: Tensor) -> Tensor:
        """What ``W0`` makes of the input, without bias."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self._finish(x, self.read(x))

    def _finish(self, x: Tensor, inner: Tensor) -> Tensor:
        """The output from the input and what ``read`` made of it."""
        if self.activation == "silu":
            inner = F.silu(inner)
        y = self.write(inner)
        if self.base is not None and self.base_scale is not None:
            y = y + self.base_scale * self.through_base(x)
        return y

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix ``(out, in)`` that the layer applies, ``a * W0 + U @ V.T``.

        Args:
            dtype: in which it is computed and returned; None: that of the factors.

        Raises:
            ValueError: there is an activation between the factors, so that no matrix does what the layer does.
        """
        if self.activation != "none":
            raise ValueError(f"a layer with {self.activation} between its factors is no matrix")
        dtype = dtype or self.U.dtype
        weight = self.U.to(dtype) @ self.V.to(dtype).T
        if self.base is not None and self.base_scale is not None:
            weight = weight + self.base_scale.to(dtype) * self.base.to(dtype)
        return weight

    def extra_repr(self) -> str:
        return f"{self._sizes()}, modes={self.modes}, bias={self.bias is not None}, base={self.base is not None}"

    def _sizes(self) -> str:
        return f"shape={self.shape}"


class LayerKind(Generic[Dense]):
    """What has to be known of one type of dense layer, for a low-rank layer to stand for it.

    A subclass sets ``dense`` and defines ``shape`` and ``make``; ``register_layer_kind`` makes it known. The dense
    layer has a parameter ``weight``, may have ``bias: (out,)``, and has no others.

    Attributes:
        dense: the type of the dense layer, or its qualified name where its package is not to be imported.
        transposed: whether the dense weight has ``in`` as its first dimension. The rows of such a weight that a process
            holds are not rows of the matrix, so ``linearise`` replaces the layer before it is converted.
    """

    dense: type[nn.Module] | str
    transposed = False

    def shape(self, module: Dense) -> tuple[int, int]:
        """``(out, in)`` of the layer's matrix."""
        raise NotImplementedError

    def make(self, module: Dense, modes: int, base: bool) -> LowRankLayer:
        """A low-rank layer for this dense one, on ``meta`` and in the dtype of its weight."""
        raise NotImplementedError

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight of the dense layer, or some of its rows, as ``(out, in)``; a view."""
        return weight

    def restore(self, module: Dense, matrix: Tensor) -> Tensor:
        """Inverse of ``matrix``: a matrix ``(out, in)``, or some of its rows, in the shape of the weight; a view."""
        return matrix

    def refusal(self, module: Dense) -> str | None:
        """Why this layer cannot be factored, in words that follow its name; None: it can be."""
        own: Any = next(cls for cls in type(module).__mro__ if self.dense in (cls, qualified_name(cls)))
        if type(module).forward is not own.forward or "forward" in vars(module):
            return f"is a {type(module).__name__} with a forward of its own"
        if not {"weight"} <= module._parameters.keys() <= {"weight", "bias"}:
            return "has a weight that is computed from other parameters"
        weight = module._parameters["weight"]
        if weight is None or not weight.is_floating_point():
            return "has no weight of real numbers"
        if not weight.requires_grad:
            return "has a frozen weight, and the factors would be trained"
        hooks: tuple[Any, ...] = (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        if any(hooks):
            return "has hooks, and a low-rank layer would not call them"
        return None


def qualified_name(cls: type) -> str:
    """``package.module.Class``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def set_fused(model: nn.Module, fused: bool) -> None:
    """Set ``fused`` of every low-rank layer, in place."""
    for module in model.modules():
        if isinstance(module, LowRankLayer):
            module.fused = fused


def set_activation(model: nn.Module, activation: Activation) -> None:
    """Set ``activation`` of every low-rank layer, in place."""
    for module in model.modules():
        if isinstance(module, LowRankLayer):
            module.activation = activation


def set_base_scale(model: nn.Module, scale: float) -> None:
    """Set ``a`` of every layer that has a base, in place."""
    for module in model.modules():
        if isinstance(module, LowRankLayer) and module.base_scale is not None:
            module.base_scale.fill_(scale)
