"""Layers shared by GPT-2 and Llama: rotary position embedding, causal attention and the pre-norm block.

Shapes: B batch, T sequence length, C hidden_size, H heads, D head_dim.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .documents import Documents
from .settings import ModelSettings

Cross = Callable[[str, Tensor], Tensor]
"""Function of the name of a linear layer in its block and its output that returns the output to use instead."""


def alone(name: str, output: Tensor) -> Tensor:
    """Return the output unchanged; used without layer crossing."""
    return output


def read_together(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """Return the outputs of several layers for the same input.

    If all layers have the same class and it defines a static method ``forward_fused(layers, x)``, that method computes
    them in one call.
    """
    cls = type(layers[0])
    if hasattr(cls, "forward_fused") and all(type(layer) is cls for layer in layers):
        outputs: Sequence[Tensor] = cls.forward_fused(layers, x)
        return outputs
    return [layer(x) for layer in layers]


class Rotary(nn.Module):
    """Rotary position embedding (RoPE; Su et al., arXiv 2104.09864, section 3.4).

    Channel ``i`` is paired with ``i + D/2``, which is compatible with the weights of ``transformers``. All blocks of a
    model share one instance. The tables are not passed to the blocks as inputs, because sharding engines cast
    floating-point inputs to the compute dtype, which would round the angles.

    Args:
        head_dim: even head dimension D.
        max_seq_len: number of positions in the tables.
        base: base of the rotary frequencies.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_seq_len: int, base: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.base = base
        for name in ("cos", "sin"):
            table = torch.empty(max_seq_len, head_dim // 2, dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)
        self.reset()

    def reset(self) -> None:
        """Recompute both tables, (max_seq_len, D/2) float32, on their current device."""
        device = self.cos.device
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        position = torch.arange(self.max_seq_len, dtype=torch.float32, device=device)
        angle = torch.outer(position, 1.0 / self.base**exponent)
        self.cos, self.sin = angle.cos(), angle.sin()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Rotary":
        # The tables are uninitialised after a move from meta, and inaccurate after a cast to half precision.
        super()._apply(fn, recurse)
        self.reset()
        return self

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rotate ``x`` (B, H, T, D) by ``positions`` (B, T), by default 0..T-1, in float32.

        The result has the dtype of ``x``.
        """
        if positions is None:
            cos, sin = self.cos[: x.size(-2)], self.sin[: x.size(-2)]
        else:
            cos, sin = (table[positions].unsqueeze(1) for table in (self.cos, self.sin))
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with separate projections ``q``, ``k``, ``v`` and ``out``."""

    def __init__(self, settings: ModelSettings, *, bias: bool, rotary: Rotary | None = None) -> None:
        super().__init__()
        self.head_dim = settings.head_dim
        self.grouped = settings.kv_heads != settings.heads
        self.dropout = settings.dropout
        hidden, kv_size = settings.width, settings.kv_heads * settings.head_dim
        self.q = nn.Linear(hidden, hidden, bias=bias)
        self.k = nn.Linear(hidden, kv_size, bias=bias)
        self.v = nn.Linear(hidden, kv_size, bias=bias)
        self.out = nn.Linear(hidden, hidden, bias=bias)
        self.rotary = rotary

    def forward(self, x: Tensor, cross: Cross = alone, documents: Documents | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C). Position t attends to positions 0..t, or to those of its document."""
        q, k, v = (
            cross(name, projected).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for name, projected in zip("qkv", read_together((self.q, self.k, self.v), x), strict=True)
        )
        if self.rotary is not None:
            positions = documents.positions if documents else None
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        mask = documents.mask if documents else None
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            enable_gqa=self.grouped,
        )
        return cross("out", self.out(mixed.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """A pre-norm transformer block: attention and MLP, each with a residual connection.

    With layer crossing (``model.layer_crossing``) each linear layer adds the output of the layer with the same name in
    the previous block: ``y = W x + W' x'``. LaX (Zhang et al., arXiv 2505.21732) adds it between the factors of
    low-rank layers, ``y = U (V^T x + V'^T x')``. Adding outputs does not depend on how a layer is factored.
    """

    def __init__(self, attention: Attention, mlp: nn.Module, norm: Callable[[], nn.Module], dropout: float) -> None:
        super().__init__()
        self.attention_norm = norm()
        self.attention = attention
        self.mlp_norm = norm()
        self.mlp = mlp
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, before: Mapping[str, Tensor] | None = None, documents: Documents | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """(B, T, C) -> (B, T, C).

        With layer crossing, ``before`` maps the names of the linear layers of the previous block to their outputs
        (B, T, out); it is empty for the first block. The block then also returns the outputs of its own layers.
        """
        own: dict[str, Tensor] = {}

        def cross(name: str, output: Tensor) -> Tensor:
            own[name] = output
            return output + before[name] if before and name in before else output

        crossing = alone if before is None else cross
        x = x + self.dropout(self.attention(self.attention_norm(x), crossing, documents))
        x = x + self.dropout(self.mlp(self.mlp_norm(x), crossing))
        return x if before is None else (x, own)
