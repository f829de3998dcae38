"""``inrank eval``: validation loss and perplexity of a checkpoint."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from ..data import DataSettings, Prepared, find_prepared, prepare
from ..runtime.errors import UserError
from ..train.evaluation import validation_loss
from ..train.records import loss_figures, perplexity
from .common import TrainedModel, add_run_arguments, device, load_trained, no_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--run DIR [--step N] [--data.cache_dir DIR]``."""
    add_run_arguments(parser)
    parser.add_argument(
        "--data.cache_dir",
        metavar="DIR",
        dest="cache_dir",
        help="folder for prepared data, created if needed (default: that of the run, read only)",
    )


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Evaluate the whole validation split, in one process, and print the results."""
    no_overrides(rest)
    trained = load_trained(arguments)
    config, state = trained.config, trained.checkpoint.state
    data = _data(arguments, trained)
    if data.fingerprint != state.fingerprint:
        raise UserError(
            f"the data has changed since {arguments.run} was trained (fingerprint {data.fingerprint[:12]}, "
            f"then {state.fingerprint[:12]}); bring back the text it was trained on"
        )
    model = trained.model.to(device())
    found = validation_loss(
        data,
        lambda inputs, targets: model(inputs.to(device()), targets.to(device())),
        batch_size=config.train.micro_batch_size,
        max_sequences=None,
        device=device(),
    )
    assert found is not None  # nothing interrupts it
    print(f"step              {state.step}")
    print(f"validation loss   {found.loss:.4f} nats per token over {found.tokens} tokens")
    for label, loss in found.sources.items():
        print(f"  {label:<15} {loss:.4f}")
    figures = loss_figures(found.loss, data.bytes_per_token)
    print(f"perplexity        {figures['perplexity']:.2f}")
    if "bits_per_byte" in figures:
        print(f"bits per byte     {figures['bits_per_byte']:.4f}")
    print(f"unigram entropy   {data.unigram_entropy:.4f} (perplexity {perplexity(data.unigram_entropy):.2f})")


def _data(arguments: argparse.Namespace, trained: TrainedModel) -> Prepared:
    """The prepared data of a run. Prepared if necessary, but only in a folder named by the user or the default one.

    A run folder may come from anywhere, so folders named in it are read but never written to.
    """
    config = trained.config
    settings = config.data if arguments.cache_dir is None else replace(config.data, cache_dir=arguments.cache_dir)
    key = (settings, config.tokenizer, config.model.max_seq_len)
    if arguments.cache_dir is not None or settings.cache_dir == DataSettings().cache_dir:
        return prepare(*key, saved_tokenizer=trained.tokenizer)
    data = find_prepared(*key, saved_tokenizer=trained.tokenizer)
    if data is None:
        raise UserError(
            f"the data of {arguments.run} is not prepared in data.cache_dir {settings.cache_dir} (the cache was "
            "emptied, or the text has changed since), and no folder is written to only because a run names it; write "
            f"--data.cache_dir {settings.cache_dir}, or another folder"
        )
    return data
