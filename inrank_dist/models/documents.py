"""Documents within a packed sequence of tokens."""

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """What attention and position embeddings need to know about the documents of a batch.

    Attributes:
        mask: (B, 1, T, T) bool. ``mask[b, 0, q, k]`` is true if position q may attend to position k: k is not after q
            and is in the same document. None: q attends to all positions up to itself.
        positions: (B, T) int64 position numbers, which start at 0 in each document. None: 0..T-1.
    """

    mask: Tensor | None
    positions: Tensor | None


def find_documents(input_ids: Tensor, separator_id: int, *, mask: bool, restart: bool) -> Documents:
    """Find the documents of packed sequences.

    A separator is the first token of the document that follows it, as in the prompt of ``generate``. The first document
    of a sequence may lack its beginning.

    Args:
        input_ids: (B, T) int64.
        separator_id: id of the token that separates documents.
        mask: whether to make the attention mask.
        restart: whether to make the position numbers.
    """
    index = torch.arange(input_ids.size(1), device=input_ids.device)
    starts = torch.where(input_ids == separator_id, index, 0).cummax(dim=1).values  # (B, T)
    allowed = None
    if mask:
        query, key = index[:, None], index[None, :]
        allowed = ((key <= query) & (key >= starts[:, :, None])).unsqueeze(1)
    return Documents(allowed, index - starts if restart else None)
