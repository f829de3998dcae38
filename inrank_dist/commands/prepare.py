"""``inrank prepare``: tokenizer and packed dataset only."""

import argparse
from collections.abc import Sequence

from ..data import prepare
from .common import add_config_arguments, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--config FILE [--section.key VALUE ...]``."""
    add_config_arguments(parser)


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Prepare the data that ``train`` with the same settings would use, and print where it is."""
    config = read_config(arguments, overrides)
    if config is None:
        return
    data = prepare(config.data, config.tokenizer, config.model.max_seq_len)
    print(f"folder              {data.folder}")
    print(f"fingerprint         {data.fingerprint}")
    print(f"vocabulary          {data.tokenizer.vocab_size}")
    print(f"training tokens     {data.train_tokens} in {len(data.train)} sequences of {data.block_length}")
    print(f"validation tokens   {data.validation_tokens} in {len(data.validation)} sequences")
    for source in data.sources:
        print(
            f"  {source.label:<17} share {source.share:.3g}, {source.data.train_tokens} tokens in {source.data.folder}"
        )
    print(f"unigram entropy     {data.unigram_entropy:.4f} nats per token (validation text)")
