"""``inrank eval``: validation loss and perplexity of a checkpoint."""

import argparse
from collections.abc import Sequence

import torch

from ..data import prepare, validation_batches
from ..errors import UserError
from ..train.loop import perplexity
from .common import add_run_arguments, device, load_trained, no_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--run DIR [--step N]``."""
    add_run_arguments(parser)


@torch.no_grad()
def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Evaluate on the whole validation split, in one process, and print the figures."""
    no_overrides(rest)
    trained = load_trained(arguments)
    config, state = trained.config, trained.checkpoint.state
    data = prepare(config.data, config.tokenizer, config.model.max_seq_len)
    if data.fingerprint != state.fingerprint:
        raise UserError(
            f"the data has changed since {arguments.run} was trained (fingerprint {data.fingerprint[:12]}, "
            f"then {state.fingerprint[:12]}); bring back the text it was trained on"
        )
    model = trained.model.to(device())
    total, tokens = 0.0, 0
    for batch in validation_batches(
        data.validation, batch_size=config.train.micro_batch_size, rank=0, world_size=1, max_sequences=None
    ):
        total += float(model(batch.inputs.to(device()), batch.targets.to(device())))
        tokens += int((batch.targets >= 0).sum())
    loss = total / tokens
    print(f"step              {state.step}")
    print(f"validation loss   {loss:.4f} nats per token over {tokens} tokens")
    print(f"perplexity        {perplexity(loss):.2f}")
    print(f"unigram entropy   {data.unigram_entropy:.4f} (perplexity {perplexity(data.unigram_entropy):.2f})")
