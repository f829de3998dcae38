"""Autoregressive sampling of tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..runtime.errors import UserError


class NotFinite(UserError):
    """The logits of the model are not finite, so no token can be sampled."""


@torch.no_grad()
def sample_tokens(
    logits_of: Callable[[Tensor], Tensor],
    prompt: list[int],
    *,
    count: int,
    max_seq_len: int,
    generator: torch.Generator,
    temperature: float = 0.8,
    top_k: int = 50,
    vocab_size: int | None = None,
    end: int | None = None,
    pad: bool = False,
) -> list[int]:
    """Sample a continuation of a prompt.

    In a sharded run all processes must call it with generators in the same state. They then sample the same tokens.

    Args:
        logits_of: function from token ids ``(1, T)`` int64 to logits ``(1, T, vocab_size)``.
        prompt: token ids, at least one. The model sees the last ``max_seq_len`` tokens.
        count: maximum number of new tokens.
        max_seq_len: maximum sequence length of the model.
        generator: random number generator on the CPU.
        temperature: sampling temperature. 0 selects the most likely token.
        top_k: sample from this many most likely tokens. 0 for all.
        vocab_size: number of tokens of the tokenizer. Logits beyond it, of a padded vocabulary, are ignored.
        end: token id at which sampling stops.
        pad: pad the input to ``max_seq_len`` tokens, so that a compiled model sees only one shape. The causal mask
            hides the padding.

    Returns:
        The new token ids, without ``end``.

    Raises:
        NotFinite: if the logits contain inf or nan.
    """
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        window = tokens[-max_seq_len:]
        padded = window + [0] * (max_seq_len - len(window)) if pad else window
        logits = logits_of(torch.tensor([padded]))[0, len(window) - 1, :vocab_size].float().cpu()
        if not logits.isfinite().all():
            raise NotFinite(
                f"the model's logits after {len(tokens)} tokens are not finite (inf or nan); take an earlier checkpoint"
            )
        if temperature == 0:
            token = int(logits.argmax())
        else:
            if top_k:
                floor = logits.topk(min(top_k, len(logits))).values[-1]
                logits = logits.masked_fill(logits < floor, -torch.inf)
            probabilities = torch.softmax(_tempered(logits, temperature), dim=0)
            token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token == end:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """Return ``logits / temperature`` up to an additive constant, without overflow to ``inf`` or ``nan``."""
    below = (logits - logits.max()).double()
    return torch.where(below < 0, below / temperature, 0.0).float()
