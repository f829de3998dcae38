"""What several commands share."""

import argparse
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..config import Config, load_config
from ..data import Tokenizer
from ..lowrank.convert import convert
from ..lowrank.layer import set_activation, set_base_scale
from ..lowrank.materialize import materialize
from ..lowrank.null import NullRanks
from ..models import LanguageModel
from ..runtime.errors import UserError
from ..runtime.files import write_atomically
from ..runtime.home import path_argument
from ..train.building import dense_skeleton
from ..train.checkpoint import Checkpoint, find_checkpoint, load_parameters
from .settings_help import settings_help

log = logging.getLogger("inrank_dist")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """``--config FILE [--section.key VALUE ...]``; the help lists every setting."""
    parser.add_argument(
        "--config", metavar="FILE", type=path_argument, required=True, help="YAML file with the settings"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as YAML and exit")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "every setting can be given as --section.key VALUE:\n\n" + settings_help()


def read_config(arguments: argparse.Namespace, overrides: Sequence[str]) -> Config | None:
    """The configuration, or None when it was only to be printed. Warns of settings that have no effect."""
    config, given = load_config(arguments.config, overrides)
    for sentence in (*config.without_effect(given), *config.cautions()):
        log.warning("warning: %s", sentence)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return None
    return config


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """``--run DIR [--step N]``."""
    parser.add_argument("--run", metavar="DIR", type=path_argument, required=True, help="run folder")
    parser.add_argument("--step", metavar="N", type=int, help="checkpoint of this step (default: the newest)")


@dataclass(frozen=True)
class OpenedRun:
    """A checkpoint with its settings, its tokenizer and its dense model on ``meta``. No tensor has been read."""

    checkpoint: Checkpoint
    config: Config
    tokenizer: Tokenizer
    skeleton: LanguageModel

    def null_ranks(self) -> Callable[[tuple[int, int]], int | None]:
        """Return a function from the shape of a layer to its null rank, or to None before the first decision."""
        settings = self.config.lowrank
        null = NullRanks(settings.rule, settings.initial_rank, self.config.run.seed)
        null.load_state_dict(self.checkpoint.state.ranks["null"])
        return lambda shape: null.of(shape) if null.checks else None


@dataclass(frozen=True)
class TrainedModel(OpenedRun):
    """A checkpoint's model in this process, whole and in float32."""

    model: LanguageModel


def no_overrides(rest: Sequence[str]) -> None:
    """Reject words that no option took."""
    if rest:
        raise UserError(f"unknown argument {rest[0]!r}; see --help")


def open_run(arguments: argparse.Namespace) -> OpenedRun:
    """Open the checkpoint that ``--run`` and ``--step`` name."""
    checkpoint = find_checkpoint(arguments.run, arguments.step)
    config, _ = load_config(checkpoint.config_file)
    tokenizer = Tokenizer.load(checkpoint.tokenizer_file)
    skeleton = dense_skeleton(config.model, tokenizer.vocab_size, tokenizer.eos_id, config.lowrank)
    return OpenedRun(checkpoint, config, tokenizer, skeleton)


def load_trained(arguments: argparse.Namespace) -> TrainedModel:
    """Load the model that ``--run`` and ``--step`` name, on CPU."""
    run = open_run(arguments)
    checkpoint, config, skeleton = run.checkpoint, run.config, run.skeleton
    model = convert(skeleton, checkpoint.state.layout)
    materialize(model, skeleton.initial_values(0).buffer, torch.device("cpu"))
    load_parameters(checkpoint.folder, {name: p.detach() for name, p in model.named_parameters()})
    set_activation(model, config.lowrank.activation)
    set_base_scale(model, config.base_scale(checkpoint.state.step))
    return TrainedModel(checkpoint, config, run.tokenizer, skeleton, model.eval())


def console(width: int) -> Console:
    """For tables: as wide as the terminal, or ``width`` where it is piped, so that none is squeezed into 80 columns."""
    return Console() if Console().is_terminal else Console(width=width)


def device() -> torch.device:
    """Where one process computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def at_least_one(arguments: argparse.Namespace, *names: str) -> None:
    """Reject options that count something and are below 1; None is one that was left out."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; write a whole number of at least 1")


def refuse_unwritable(file: Path | None) -> None:
    """Reject ``--json FILE`` where it cannot be written, before minutes are spent on measuring."""
    if file is None:
        return
    if file.is_dir():
        raise UserError(f"--json is {file}, which is a folder; write the name of a file")
    if not (file.parent.is_dir() and os.access(file.parent, os.W_OK | os.X_OK)):
        raise UserError(f"--json is {file}, but {file.parent} is no folder that can be written; write one that can")


def write_record(file: Path | None, record: Mapping[str, Any]) -> None:
    """What ``--json FILE`` asked for, if it did."""
    if file is not None:
        write_atomically(file, (json.dumps(record, indent=1) + "\n").encode())
