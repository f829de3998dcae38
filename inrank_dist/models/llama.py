"""Llama (Touvron et al., arXiv 2302.13971 and 2307.09288): RMSNorm, SwiGLU, rotary positions and no biases."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .language_model import Decoder
from .layers import Attention, Block, Cross, Rotary, alone, read_together
from .settings import ModelSettings


class GatedMLP(nn.Module):
    """SwiGLU, ``down(silu(gate(x)) * up(x))`` (Shazeer, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, mlp_size, bias=False)
        self.up = nn.Linear(hidden_size, mlp_size, bias=False)
        self.down = nn.Linear(mlp_size, hidden_size, bias=False)

    def forward(self, x: Tensor, cross: Cross = alone) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        gate, up = read_together((self.gate, self.up), x)
        return cross("down", self.down(F.silu(cross("gate", gate)) * cross("up", up)))


class Llama(Decoder):
    """Llama with optional grouped-query attention."""

    def __init__(self, settings: ModelSettings, vocab_size: int) -> None:
        norm = partial(nn.RMSNorm, settings.width, eps=settings.norm_eps)
        rotary = Rotary(settings.head_dim, settings.max_seq_len, settings.rotary_base)
        blocks = [
            Block(
                Attention(settings, bias=False, rotary=rotary),
                GatedMLP(settings.width, settings.mlp_size),
                norm,
                dropout=0.0,
            )
            for _ in range(settings.depth)
        ]
        super().__init__(settings, vocab_size, blocks, final_norm=norm())
