"""``inrank train``: the main job."""

import argparse
import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..config import Config, load_config, shown
from ..data import check_batch_sizes, prepare
from ..engine.context import Context
from ..errors import UserError
from ..train.checkpoint import Checkpoint, find_checkpoint, list_checkpoints
from ..train.loop import Trainer
from ..train.monitors import ConsoleMonitor, JsonlMonitor, Monitors, TensorBoardMonitor
from ..train.report import write_report
from ..train.start import dense_skeleton, layer_shapes
from .common import add_config_arguments, read_config

log = logging.getLogger("inrank_dist")

FIXED = ("model", "lowrank", "tokenizer", "run.seed", "train.global_batch_size")
"""Sections and settings that a resumed run cannot change."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--config FILE [--section.key VALUE ...]``."""
    add_config_arguments(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check the settings, say what would be trained, touch nothing"
    )


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Train until ``train.steps``, from the newest checkpoint of the run folder if there is one."""
    config = read_config(arguments, overrides)
    if config is None:
        return
    context = Context()
    engine = config.parallel.resolve(context.world_size)
    # Everything that can be wrong without data is found before a minute is spent on data.
    skeleton = dense_skeleton(config.model, config.tokenizer.vocab_size)
    shapes = layer_shapes(skeleton, config.lowrank)
    check_batch_sizes(config.train.global_batch_size, config.train.micro_batch_size, context.world_size)
    if arguments.dry_run:
        print(_plan(config, skeleton, shapes))
        return
    _refuse_unwritable(config.run.folder)
    checkpoint = _checkpoint_to_resume(config)
    if checkpoint and checkpoint.state.step >= config.train.steps:
        log.info("%s is complete at step %d; raise train.steps to train on", config.run.folder, checkpoint.state.step)
        return
    data = prepare(config.data, config.tokenizer, config.model.max_seq_len)
    if config.run.deterministic:
        torch.use_deterministic_algorithms(True)
    context.start(config.parallel.timeout_seconds, always=engine != "local")
    trainer = Trainer(config, context, data, checkpoint)
    # Only now, when nothing is left to complain of, is the run folder touched.
    monitors = context.main_does(_open_run_folder, config, checkpoint) or Monitors()
    try:
        trainer.run(monitors)
    finally:
        monitors.close()
    context.main_does(_report, config.run.folder)
    del trainer
    context.stop()


def _plan(config: Config, skeleton: torch.nn.Module, shapes: dict[str, tuple[int, int]]) -> str:
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    train = config.train
    tokens = train.steps * train.global_batch_size * config.model.max_seq_len
    batch = f"{train.global_batch_size} sequences of {config.model.max_seq_len} tokens"
    lines = [
        f"{config.model.name}: {parameters / 1e6:.1f}M parameters dense, vocabulary {config.tokenizer.vocab_size}",
        f"{train.steps} steps of {batch}: {tokens / 1e6:.1f}M tokens",
    ]
    if shapes:
        low = config.lowrank
        factored = sum(out * in_ for out, in_ in shapes.values())
        start = sum((out + in_) * low.rule.modes(low.initial_rank, min(out, in_)) for out, in_ in shapes.values())
        lines.append(
            f"lowrank.mode {low.mode}: {len(shapes)} layers factored, rank {low.initial_rank} at the start; "
            f"{(parameters - factored + start) / 1e6:.1f}M parameters at the start without the base"
        )
    return "\n".join(lines)


def _checkpoint_to_resume(config: Config) -> Checkpoint | None:
    folder = config.run.folder
    if not list_checkpoints(folder):
        return None
    checkpoint = find_checkpoint(folder)
    before, now = (dataclasses.asdict(each) for each in (load_config(checkpoint.config_file)[0], config))
    for fixed in FIXED:
        section, _, key = fixed.partition(".")
        for name in [key] if key else now[section]:
            was, is_now = shown(before[section][name]), shown(now[section][name])
            if was != is_now:
                raise UserError(
                    f"{folder} was trained with {section}.{name} {was}, now it is {is_now}; "
                    f"write {was}, or another run.dir to start anew"
                )
    return checkpoint


def _refuse_unwritable(folder: Path) -> None:
    """A run folder that cannot be made is found before the data is prepared; nothing is made yet."""
    present = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not present.is_dir():
        raise UserError(f"run.dir is {folder}, but {present} is not a folder; write a folder that can be written")
    if not os.access(present, os.W_OK | os.X_OK):
        raise UserError(f"run.dir is {folder}, and {present} cannot be written; write a folder that can")


def _open_run_folder(config: Config, checkpoint: Checkpoint | None) -> Monitors:
    folder = config.run.folder
    step = checkpoint.state.step if checkpoint else 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        metrics = JsonlMonitor(folder / "metrics.jsonl")
        metrics.truncate_after(step)
        curves = TensorBoardMonitor(folder / "tensorboard", purge_step=step + 1)
    except OSError as error:
        raise UserError(f"run.dir {folder} cannot be written: {error.strerror}; write a folder that can") from None
    return Monitors([metrics, curves, ConsoleMonitor(config.train.steps)])


def _report(folder: Path) -> None:
    log.info("report: %s", write_report(folder))
