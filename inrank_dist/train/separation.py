"""Check that a model keeps documents apart."""

import torch

from ..engine.engine import Engine
from ..runtime.errors import UserError


@torch.no_grad()
def refuse_leaks(engine: Engine, separator_id: int, *, batch_size: int, seq_len: int, vocab_size: int) -> None:
    """Check that the tokens of one document do not change the loss of the next, in two forward passes.

    Models of ``transformers`` derive the attention mask from position numbers that start again, but not all of them do.
    The losses must be equal: a masked position adds exactly zero, so there is no rounding to allow for.

    Args:
        engine: engine of the model.
        separator_id: id of the token that separates documents.
        batch_size, seq_len: shape of the batch (B, T).
        vocab_size: number of tokens.

    Raises:
        UserError: on all processes, if documents are not kept apart.
    """
    ids = [index for index in range(min(vocab_size, 1000)) if index != separator_id]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.tensor(ids)[torch.randint(len(ids), (batch_size, seq_len), generator=generator)]
    start = seq_len // 2
    inputs[:, start] = separator_id
    targets = inputs.roll(-1, dims=1)
    targets[:, :start] = targets[:, -1] = -100
    others = inputs.clone()
    others[:, :start] = inputs[:, :start].flip(1).roll(1, dims=0)
    training = engine.model.training
    engine.model.eval()
    losses = torch.stack([engine.loss(each, targets).double() for each in (inputs, others)])
    engine.model.train(training)
    engine.context.sum(losses)
    if bool(losses[0] != losses[1]):
        raise UserError(
            "model.mask_documents is true, but this model of transformers attends to the previous document; write "
            "false for model.mask_documents and model.restart_positions, or another model"
        )
