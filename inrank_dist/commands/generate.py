"""``inrank generate``: sample text from a checkpoint."""

import argparse
import math
from collections.abc import Sequence

from torch import Tensor

from ..lowrank.init import generator_for
from ..runtime.errors import UserError
from ..runtime.progress import phase
from ..train.sampling import sample_tokens
from .common import add_run_arguments, device, load_trained, no_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--run DIR --prompt TEXT`` and the sampling options."""
    add_run_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", default="", help="text to continue (default: start a document)")
    parser.add_argument("--tokens", metavar="N", type=int, default=128, help="maximum number of tokens (default 128)")
    parser.add_argument("--samples", metavar="N", type=int, default=1, help="number of samples (default 1)")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.8, help="0: greedy decoding (default 0.8)")
    parser.add_argument(
        "--top-k", metavar="K", type=int, default=50, help="sample from the K most likely tokens; 0: all (default 50)"
    )
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="random seed (default 0)")


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print each sample with its prompt."""
    no_overrides(rest)
    for name, least in (("tokens", 1), ("samples", 1), ("temperature", 0), ("top_k", 0)):
        if not least <= getattr(arguments, name) < math.inf:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is {getattr(arguments, name)}; write a number of at least {least}")
    trained = load_trained(arguments)
    model, tokenizer = trained.model.to(device()), trained.tokenizer
    prompt = [tokenizer.eos_id, *tokenizer.encode(arguments.prompt)]

    def logits(ids: Tensor) -> Tensor:
        advance(1)
        found: Tensor = model(ids.to(device()))
        return found

    for index in range(arguments.samples):
        with phase("sampling", arguments.tokens, unit="tokens") as advance:
            tokens = sample_tokens(
                logits,
                prompt,
                count=arguments.tokens,
                max_seq_len=trained.config.model.max_seq_len,
                generator=generator_for(arguments.seed, "generate", index),
                temperature=arguments.temperature,
                top_k=arguments.top_k,
                vocab_size=tokenizer.vocab_size,
                end=tokenizer.eos_id,
            )
        if index:
            print("-" * 40)
        print(arguments.prompt + tokenizer.decode(tokens))
