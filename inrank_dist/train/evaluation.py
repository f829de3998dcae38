"""Validation loss, independent of the engine and the number of processes."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..data import validation_batches
from ..engine.engine import Engine

if TYPE_CHECKING:
    from datasets import Dataset


@torch.no_grad()
def validation_loss(
    engine: Engine,
    dataset: "Dataset",
    *,
    batch_size: int,
    max_sequences: int | None,
    interrupted: Callable[[], bool] = lambda: False,
) -> float | None:
    """Return the mean loss in nats per token, with every token counted once.

    Args:
        engine: engine of the model.
        dataset: the validation data.
        batch_size: sequences per forward pass of one process.
        max_sequences: number of sequences to use, spread evenly over the dataset. None for all.
        interrupted: called before every batch; returns True to stop. Must return the same value in all processes.

    Returns:
        The loss, or None if interrupted.
    """
    context = engine.context
    engine.model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for batch in validation_batches(
        dataset,
        batch_size=batch_size,
        rank=context.rank,
        world_size=context.world_size,
        max_sequences=max_sequences,
    ):
        if interrupted():
            return None
        total[0] += engine.loss(batch.inputs, batch.targets)
        total[1] += (batch.targets >= 0).sum()
    context.sum(total)
    return float(total[0] / total[1])
