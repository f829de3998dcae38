"""Validation loss, independent of the engine and the number of processes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data import validation_batches
from ..runtime.progress import phase

if TYPE_CHECKING:
    from ..data import Prepared


@dataclass(frozen=True)
class ValidationLoss:
    """Losses in nats per token.

    Attributes:
        loss: the mean over all tokens; for a mixture the weighted mean of the losses of its sources.
        tokens: number of tokens.
        sources: the loss of each source of a mixture, by label; empty without a mixture.
    """

    loss: float
    tokens: int
    sources: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def validation_loss(
    data: "Prepared",
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    batch_size: int,
    max_sequences: int | None,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    add_up: Callable[[Tensor], object] = lambda total: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> ValidationLoss | None:
    """Compute the mean loss on the validation data, with every token counted once.

    Args:
        data: the prepared data.
        loss_of: function of inputs and targets (batch_size, T) int64 on the CPU that returns the summed loss.
        batch_size: sequences per forward pass of one process.
        max_sequences: number of sequences to use, spread evenly over the data. None for all. A mixture divides them by
            weight, with at least one for each source.
        device: device of the sums.
        rank, world_size: of this process. Every process computes its share.
        add_up: sums a tensor over the processes, in place.
        interrupted: called before every batch; returns True to stop. Must return the same value in all processes.

    Returns:
        The losses, the same in all processes, or None if interrupted.
    """
    parts = data.parts
    counts = [None if max_sequences is None else max(round(max_sequences * part.share), 1) for part in parts]
    sizes = (
        len(part.data.validation) if count is None else min(count, len(part.data.validation))
        for part, count in zip(parts, counts, strict=True)
    )
    totals = torch.zeros(len(parts), 2, dtype=torch.float64, device=device)
    with phase("validating", sum(sizes), unit="sequences", enabled=rank == 0) as advance:
        for total, part, count in zip(totals, parts, counts, strict=True):
            for batch in validation_batches(
                part.data.validation, batch_size=batch_size, rank=rank, world_size=world_size, max_sequences=count
            ):
                if interrupted():
                    return None
                total[0] += loss_of(batch.inputs, batch.targets)
                total[1] += (batch.targets >= 0).sum()
                advance(len(batch.inputs) * world_size)
    add_up(totals)
    losses = (totals[:, 0] / totals[:, 1]).tolist()
    return ValidationLoss(
        loss=sum(loss * part.share for loss, part in zip(losses, parts, strict=True)),
        tokens=int(totals[:, 1].sum()),
        sources={source.label: loss for source, loss in zip(data.sources, losses, strict=False)},
    )
