"""GPT-2 (Radford et al., 2019): LayerNorm, GELU, learned positions, and biases in all layers except the head."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .language_model import Decoder
from .layers import Attention, Block, Cross, alone
from .settings import ModelSettings


class GeluMLP(nn.Module):
    """``down(gelu(up(x)))`` with the tanh approximation of GELU used in GPT-2 (``gelu_new`` in ``transformers``)."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, mlp_size)
        self.down = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor, cross: Cross = alone) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return cross("down", self.down(F.gelu(cross("up", self.up(x)), approximate="tanh")))


class GPT2(Decoder):
    """GPT-2 with separate query, key and value projections and the position embedding ``pos_embed``."""

    def __init__(self, settings: ModelSettings, vocab_size: int) -> None:
        norm = partial(nn.LayerNorm, settings.width, eps=settings.norm_eps)
        blocks = [
            Block(
                Attention(settings, bias=True),
                GeluMLP(settings.width, settings.mlp_size),
                norm,
                settings.dropout,
            )
            for _ in range(settings.depth)
        ]
        super().__init__(settings, vocab_size, blocks, final_norm=norm())
        self.pos_embed = nn.Embedding(settings.max_seq_len, settings.width)
        self.dropout = nn.Dropout(settings.dropout)

    def embed(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Add token and position embeddings and apply dropout: (B, T) int64 -> (B, T, hidden_size)."""
        if positions is None:
            positions = torch.arange(input_ids.size(1), device=input_ids.device)
        return self.dropout(self.tok_embed(input_ids) + self.pos_embed(positions))
