"""Text from a model, token by token."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..runtime.errors import UserError


class NotFinite(UserError):
    """The model's logits are not finite, so that there is nothing to draw from."""


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
    end: int | None = None,
    pad: bool = False,
) -> list[int]:
    """Continue a prompt.

    Args:
        logits_of: ``(1, T) int64 -> (1, T, vocabulary)``; in a sharded run all processes call it together and, with
            equal generators, draw the same tokens.
        prompt: at least one token; only the last ``max_seq_len`` are seen.
        temperature: 0 takes the likeliest token.
        top_k: draw among this many likeliest; 0: all.
        end: token that ends the text early.
        pad: always pass ``max_seq_len`` tokens (the causal mask hides the rest), so that a compiled model sees one
            shape.

    Returns:
        The new tokens, without ``end``.

    Raises:
        NotFinite: the logits hold inf or nan.
    """
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        window = tokens[-max_seq_len:]
        padded = window + [0] * (max_seq_len - len(window)) if pad else window
        logits = logits_of(torch.tensor([padded]))[0, len(window) - 1].float().cpu()
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
    """``logits / temperature`` but for a constant, finite or ``-inf`` at any temperature above zero."""
    below = (logits - logits.max()).double()
    return torch.where(below < 0, below / temperature, 0.0).float()
