"""Base classes of low-rank layers and of layer kinds."""

from typing import Any, Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["none", "silu"]
Dense = TypeVar("Dense", bound=nn.Module)


def core_names(depth: int) -> list[str]:
    """Return the names of the cores of a layer that is a product of ``depth`` factors: ``C1``, ``C2`` and so on."""
    return [f"C{index}" for index in range(1, depth - 1)]


def core_index(leaf: str) -> int:
    """Return ``j`` if the name of a parameter in its layer is that of the core ``C_j``, otherwise 0."""
    return int(leaf[1:]) if leaf[:1] == "C" and leaf[1:].isdecimal() else 0


def is_factor(leaf: str) -> bool:
    """Return whether the name of a parameter in its layer is that of a factor: ``U``, ``V`` or a core."""
    return leaf in ("U", "V") or core_index(leaf) > 0


class LowRankLayer(nn.Module):
    """A layer with the weight ``W = a * W0 + U @ V.T`` in place of a dense ``W: (out, in)``.

    A deep layer is a product of more than two factors, ``W = a * W0 + U @ C_k ... C_1 @ V.T``, with square cores
    ``C_j: (R, R)`` (Yaras et al., arXiv 2406.04112).

    The rank dimension is the last dimension of both factors. Sharding the first dimension therefore never splits it,
    and a rank event acts on the local rows of each process.

    Subclasses define how the factors act on the input: ``read``, ``write`` and ``through_base``. The parameters are
    uninitialised, see ``lowrank.init``.

    Args:
        shape: ``(out, in)`` of the matrix.
        modes: ``R``, the number of columns of both factors.
        bias: whether to add a bias ``(out,)``.
        base: whether to add a dense base ``W0: (out, in)``, which is not trained.

    Attributes:
        depth: number of factors, ``k + 2``.
        U, V: factors, ``(out, R)`` and ``(in, R)``.
        C1, C2, ...: the cores, in the order in which they act on the input. None at depth 2.
        base_scale: ``a``, a float32 scalar buffer that is not saved. None without a base.
        activation: activation between the factors. ``none`` is the identity.
        fused: whether the products with ``V`` of layers that read the same input are computed as one.
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
        self.shape, self.modes, self.depth = shape, modes, 2
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
            # A tensor, because torch.compile would recompile for each new value of a Python float.
            scale = torch.ones((), device=device)
        self.register_buffer("base_scale", scale, persistent=False)

    def deepen(self, depth: int) -> None:
        """Make the layer a product of ``depth`` factors by adding uninitialised cores. Called once."""
        self.depth = depth
        for name in core_names(depth):
            core = torch.empty(self.modes, self.modes, device=self.U.device, dtype=self.U.dtype)
            self.register_parameter(name, nn.Parameter(core))

    @property
    def cores(self) -> list[Tensor]:
        """The cores ``C_1`` to ``C_k``."""
        return [getattr(self, name) for name in core_names(self.depth)]

    def read(self, x: Tensor) -> Tensor:
        """Apply ``V.T`` to the input."""
        raise NotImplementedError

    def mix(self, inner: Tensor, core: Tensor) -> Tensor:
        """Apply a core to the output of ``read`` or of another core."""
        return F.linear(inner, core)

    def write(self, inner: Tensor) -> Tensor:
        """Apply ``U`` to the output of ``read``, of the last core or of the activation, and add the bias."""
        raise NotImplementedError

    def through_base(self, x: Tensor) -> Tensor:
        """Apply ``W0`` to the input, without the bias."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self._finish(x, self.read(x))

    def _finish(self, x: Tensor, inner: Tensor) -> Tensor:
        """Compute the output from the input and the output of ``read``."""
        for core in self.cores:
            inner = self.mix(inner, core)
        if self.activation == "silu":
            inner = F.silu(inner)
        y = self.write(inner)
        if self.base is not None and self.base_scale is not None:
            y = y + self.base_scale * self.through_base(x)
        return y

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight ``a * W0 + U @ C_k ... C_1 @ V.T`` of the layer, ``(out, in)``.

        Args:
            dtype: dtype of the computation and of the result. Default: the dtype of the factors.

        Raises:
            ValueError: there is an activation between the factors, so the layer is not linear.
        """
        if self.activation != "none":
            raise ValueError(f"a layer with {self.activation} between its factors is no matrix")
        dtype = dtype or self.U.dtype
        left = self.U.to(dtype)
        for core in reversed(self.cores):
            left = left @ core.to(dtype)
        weight = left @ self.V.to(dtype).T
        if self.base is not None and self.base_scale is not None:
            weight = weight + self.base_scale.to(dtype) * self.base.to(dtype)
        return weight

    def extra_repr(self) -> str:
        depth = "" if self.depth == 2 else f", depth={self.depth}"
        return f"{self._sizes()}, modes={self.modes}{depth}, bias={self.bias is not None}, base={self.base is not None}"

    def _sizes(self) -> str:
        return f"shape={self.shape}"


class LayerKind(Generic[Dense]):
    """The conversion of one type of dense layer to a low-rank layer and back.

    Subclasses set ``dense`` and define ``shape`` and ``make``; ``register_layer_kind`` registers them. The dense layer
    must have a parameter ``weight``, may have a parameter ``bias: (out,)``, and must have no other parameters.

    Attributes:
        dense: the type of the dense layer, or its qualified name if its package should not be imported.
        transposed: whether the first dimension of the dense weight is ``in``. A shard of such a weight holds columns of
            the matrix, so ``linearise`` must replace the layer before it is converted.
    """

    dense: type[nn.Module] | str
    transposed = False

    def shape(self, module: Dense) -> tuple[int, int]:
        """Return ``(out, in)`` of the matrix of the layer."""
        raise NotImplementedError

    def make(self, module: Dense, modes: int, base: bool) -> LowRankLayer:
        """Return a low-rank layer to replace the dense one, on ``meta`` and in the dtype of its weight."""
        raise NotImplementedError

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the weight of the dense layer, or some of its rows, as a view of shape ``(out, in)``."""
        return weight

    def restore(self, module: Dense, matrix: Tensor) -> Tensor:
        """Return a matrix ``(out, in)``, or some of its rows, as a view in the shape of the weight.

        This is the inverse of ``matrix``.
        """
        return matrix

    def refusal(self, module: Dense) -> str | None:
        """Return the reason why the layer cannot be factored, worded to follow its name, or None if it can be."""
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
    """Return ``package.module.Class``."""
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
    """Set the scale ``a`` of every layer that has a base, in place."""
    for module in model.modules():
        if isinstance(module, LowRankLayer) and module.base_scale is not None:
            module.base_scale.fill_(scale)
