"""``inrank export``: a trained model as a folder of ``transformers``, or with its factors."""

import argparse
import dataclasses
import logging
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from ..data.whole_documents import HuggingFaceTokenizer, LossySentencePiece
from ..hub.card import Card, CardLayer
from ..hub.factors import write_factors
from ..hub.weights import Cut, Kept, Weights
from ..hub.writer import DTYPES
from ..lowrank.kinds import matrix_shape
from ..report.history import History
from ..report.reading import reading
from ..runtime.errors import UserError, install
from ..runtime.files import flush_path
from ..runtime.home import path_argument
from ..train.init_from import dense_weights
from ..train.monitors.jsonl import read_metrics
from .common import OpenedRun, add_run_arguments, no_overrides, open_run

log = logging.getLogger("inrank_dist")

TOKENIZER = "tokenizer.model"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--run DIR --output FOLDER`` and the options of the format."""
    add_run_arguments(parser)
    parser.add_argument("--output", metavar="FOLDER", type=path_argument, required=True, help="new folder to write")
    parser.add_argument(
        "--format",
        choices=("hf", "factors"),
        default="hf",
        help="hf: the dense model for transformers, with the factors merged (default); factors: for inrank_dist.load",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights (default float32)")
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="largest weight file of format hf (default 5GB)"
    )
    parser.add_argument("--rank", metavar="R", type=int, help="truncate the factors to this rank")
    parser.add_argument("--energy", metavar="E", type=float, help="keep this share of the energy of each layer")


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Write the folder and print what it holds."""
    no_overrides(rest)
    cut, max_shard_bytes, out = _cut(arguments), _bytes(arguments.max_shard_size), arguments.output
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--output is {out}, which exists; write a new folder")
    opened, dtype = open_run(arguments), DTYPES[arguments.dtype]
    weights = _weights(opened, arguments.format, cut)
    work = out.parent / f".{out.name}.tmp-{uuid.uuid4().hex}"
    try:
        work.mkdir(parents=True)
        code = None
        if arguments.format == "hf":
            code = _write_transformers(work, opened, weights, dtype, max_shard_bytes)
            size = f"{sum(parameter.numel() for parameter in opened.skeleton.parameters()):,}"
            size += " (dense weights; the factors are merged)" if weights.layout else ""
        else:
            size = f"{_write_factors(work, opened, weights, dtype):,}"
        card = _card(out.name, arguments.format, opened, weights, size, code)
        (work / "README.md").write_text(card.text(), encoding="utf-8")
        for path in (*work.rglob("*"), work):
            flush_path(path)
        if out.is_dir():
            out.rmdir()
        os.rename(work, out)
    except OSError as error:
        raise UserError(
            f"--output is {out}, and it cannot be written ({error.strerror or error}); write another"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _show(out, arguments.format, opened.checkpoint.state.step, weights, code)


def _weights(opened: OpenedRun, form: str, cut: Cut | None) -> Weights:
    """Return the parameters to export, which are read later, one at a time.

    Raises:
        UserError: the checkpoint cannot be exported in this way.
    """
    layout, activation = opened.checkpoint.state.layout, opened.config.lowrank.activation
    if cut is not None and not layout:
        raise UserError(
            f"{opened.checkpoint.run_folder} has no low-rank layers, so there is nothing to truncate; leave out the cut"
        )
    if form == "hf" and activation != "none" and layout:
        raise UserError(f"lowrank.activation is {activation}, so the factors cannot be merged; write --format factors")
    if cut is not None and activation != "none":
        raise UserError(
            f"lowrank.activation is {activation}, so the product of the factors cannot be truncated; leave out the cut"
        )
    return dense_weights(opened.checkpoint, opened.config, opened.skeleton, cut)


def _cut(arguments: argparse.Namespace) -> Cut | None:
    if arguments.rank is not None and arguments.energy is not None:
        raise UserError("--rank and --energy are both given; write one of them")
    if arguments.rank is not None and arguments.rank < 1:
        raise UserError(f"--rank is {arguments.rank}; write a whole number of at least 1")
    if arguments.energy is not None and not 0 < arguments.energy <= 1:
        raise UserError(f"--energy is {arguments.energy}; write a share above 0 and at most 1, such as 0.99")
    if arguments.rank is None and arguments.energy is None:
        return None
    return Cut(arguments.rank, arguments.energy)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)\s*(KB|MB|GB|)", text.strip(), re.IGNORECASE)
    if not found or not int(found[1]):
        raise UserError(f"--max-shard-size is {text}; write a size such as 500MB or 5GB")
    return int(found[1]) * UNITS[found[2].upper()]


def _write_transformers(
    work: Path, opened: OpenedRun, weights: Weights, dtype: torch.dtype, max_shard_bytes: int
) -> str | None:
    """Write the folder.

    Returns:
        The file with the code of the model, or None if ``transformers`` has its class.
    """
    try:
        import tokenizers

        from ..hub.tokenizer import fast_tokenizer, write_tokenizer
        from ..hub.transformers_model import write_transformers
    except ImportError as error:
        raise UserError(
            f"--format hf needs transformers, which cannot be imported ({error}); {install('hf')}, or --format factors"
        ) from None
    tokenizer, skeleton, settings = opened.tokenizer, opened.skeleton, opened.config.model
    code = write_transformers(
        work,
        settings,
        skeleton.vocab_size,
        tokenizer.eos_id,
        weights,
        skeleton.initial_values(0).buffer,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )
    special_tokens_in_text = False
    if isinstance(tokenizer, HuggingFaceTokenizer):
        fast = tokenizers.Tokenizer.from_str(tokenizer.tokenizer_json)
        special_tokens_in_text = tokenizer.special_tokens_in_text
    else:
        tokenizer.save(work / TOKENIZER)
        if isinstance(tokenizer, LossySentencePiece):
            log.warning("the tokenizer normalizes text; it is exported as %s, without a tokenizer.json", TOKENIZER)
            return code
        fast = fast_tokenizer(tokenizer.model)
    write_tokenizer(
        work, fast, tokenizer.eos_piece, settings.max_seq_len, special_tokens_in_text=special_tokens_in_text
    )
    return code


def _write_factors(work: Path, opened: OpenedRun, weights: Weights, dtype: torch.dtype) -> int:
    config, vocab_size = opened.config, opened.skeleton.vocab_size
    layout, activation = weights.layout, config.lowrank.activation
    parameters = write_factors(work, config.model, vocab_size, layout, weights, activation, dtype=dtype)
    opened.tokenizer.save(work / TOKENIZER)
    return parameters


def _card(name: str, form: str, opened: OpenedRun, weights: Weights, size: str, code: str | None) -> Card:
    checkpoint, config, tokenizer = opened.checkpoint, opened.config, opened.tokenizer
    state = checkpoint.state
    try:
        records = read_metrics(checkpoint.run_folder / "metrics.jsonl")
    except UserError as error:  # the model does not depend on them
        log.warning("the model card lacks the results of the run: %s", error)
        records = []
    history = History(record for record in records if record.get("step", 0) <= state.step)
    null_rank_of, layers = opened.null_ranks(), {}
    for layer, layout in state.layout.items():
        shape = matrix_shape(weights.skeleton.get_submodule(layer))
        layers[layer] = CardLayer(shape, layout.rank, state.ranks["found"].get(layer), null_rank_of(shape))
    facts = {"parameters of this model": size}
    facts |= {"step": f"{state.step:,} of {config.train.steps:,}", "tokens": f"{state.tokens:,}"}
    if history.validation_loss is not None:
        facts["validation loss"] = f"{history.validation_loss:.4f} nats per token"
        facts["unigram entropy"] = f"{state.unigram_entropy:.4f} nats per token"
    facts |= {"vocabulary": f"{tokenizer.vocab_size:,}", "context": f"{config.model.max_seq_len:,} tokens"}
    facts |= {"optimizer": config.optimizer.name, "seed": str(config.run.seed)}
    facts |= {library: version for library, version in state.versions.items()}
    return Card(
        name=name,
        architecture=config.model.architecture,
        mode=config.lowrank.mode,
        facts=facts,
        sentences=reading(history, dataclasses.asdict(config)) if history.count else [],
        layers=layers,
        kept=dict(weights.kept),
        start=tokenizer.eos_piece,
        for_transformers=form == "hf",
        code=code,
    )


def _show(out: Path, form: str, step: int, weights: Weights, code: str | None) -> None:
    if weights.kept:
        layers = weights.kept.values()
        ranks = [kept.rank for kept in layers]
        total = Kept(sum(ranks), sum(kept.discarded for kept in layers), sum(kept.energy for kept in layers))
        before = sum(layer.modes for layer in weights.layout.values()) / len(weights.layout)
        print(
            f"truncated {len(ranks)} layers from {before:.1f} modes in the mean to {sum(ranks) / len(ranks):.1f}, "
            f"which discards {total.share:.4%} of the energy of the products"
        )
    trust = "" if code is None else ", trust_remote_code=True"
    use = f"transformers.AutoModelForCausalLM.from_pretrained({str(out)!r}{trust})"
    if form == "factors":
        use = f"inrank_dist.load({str(out)!r})"
    print(f"wrote {out}, the model of step {step}; load it with {use}")
    if code is not None:
        print(
            f"transformers has no class for model.layer_crossing; with trust_remote_code=True it executes {out / code}"
        )
