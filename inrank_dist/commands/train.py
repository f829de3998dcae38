"""``inrank train``: the main job."""

import argparse
import gc
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import SETTINGS, Config, load_config
from ..data import Prepared, Tokenizer, prepare
from ..data.preparation import check_source
from ..data.tokenizer import load_tokenizer
from ..engine.settings import zero_stage
from ..method.initial import layer_shapes
from ..report import write_report
from ..runtime.context import Context
from ..runtime.errors import UserError
from ..runtime.home import path_argument
from ..runtime.progress import phase
from ..runtime.signals import NOTHING_LOST
from ..runtime.stop import Stopped, StopRequest
from ..runtime.watch import Watch, request_stop
from ..train.building import cost_setup, dense_skeleton, zero_config
from ..train.changes import Change, learning_rate_jump, refuse_changes
from ..train.checkpoint import Checkpoint, branch_point, check_run_folder, peek_checkpoint, resumable
from ..train.init_from import initial_values
from ..train.memory import keep_freed_memory
from ..train.monitors import Monitors
from ..train.run_folder import RunFolder, refuse_unwritable
from ..train.session import build
from ..train.trackers import check_installed
from .common import add_config_arguments, read_config
from .plan import show_plan

log = logging.getLogger("inrank_dist")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--config FILE [--section.key VALUE ...]``."""
    add_config_arguments(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check the settings, say what would be trained, touch nothing"
    )
    parser.add_argument(
        "--allow-change",
        metavar="KEY",
        action="append",
        default=[],
        help="go on with another value of this setting than the run was trained with so far (may be repeated)",
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="RUN",
        type=path_argument,
        help="start run.dir from a checkpoint of this run folder, which stays as it is (default with --from-step: the "
        "run folder that FILE names)",
    )
    parser.add_argument(
        "--from-step",
        metavar="N",
        type=int,
        help="start run.dir from this step of that run (default: its newest)",
    )


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Train until ``train.steps``, from the newest checkpoint of the run folder if there is one."""
    config = read_config(arguments, overrides)
    if config is None:
        return
    for key in arguments.allow_change:
        if key not in SETTINGS:
            raise UserError(f"--allow-change {key} names no setting; write one such as optimizer.lr")
    context = Context()
    engine = config.parallel.resolve(context.world_size)
    # Everything that can be wrong without data is found before a minute is spent on data.
    skeleton = dense_skeleton(config.model, config.tokenizer.vocab_size, lowrank=config.lowrank)
    layer_shapes(skeleton, config.lowrank)
    if config.train.cuda_graph and engine not in ("local", "ddp"):
        raise UserError(
            f"train.cuda_graph is true but parallel.engine is {engine}, whose weights move; write parallel.engine: ddp "
            "or train.cuda_graph: false"
        )
    if config.train.cuda_graph and context.device.type == "cpu":
        log.warning("warning: train.cuda_graph has no effect: there is no GPU")
    setup = cost_setup(config, context.world_size)
    if config.train.cuda_graph and setup.accumulation > 1:
        # A gradient that autograd took over from the memory of a graph is overwritten by the next micro-batch.
        raise UserError(
            f"train.cuda_graph is true but a step has {setup.accumulation} micro-batches; write train.micro_batch_size "
            f"{config.train.global_batch_size // context.world_size} or train.cuda_graph: false"
        )
    if engine.startswith("zero"):
        zero_config(zero_stage(engine), config, context.world_size)
    check_installed(config.log.trackers)
    refuse_unwritable(config.run.folder)
    start = _start_of(config, arguments)
    seen = peek_checkpoint(config.run.folder) or start.peek()
    if config.model.init_from and not seen and context.is_main:
        initial_values(config, skeleton, load_tokenizer(config.tokenizer))  # raises
    if seen:
        changes = refuse_changes(config, seen, arguments.allow_change)
        start.refuse_finished(config, seen)
    if arguments.dry_run:
        check_source(config.data)
        if config.tokenizer.path and not seen:  # else the checkpoint holds it
            load_tokenizer(config.tokenizer)
        if context.is_main:
            show_plan(config, context.world_size, None)
            _tell_start(config, seen, changes if seen else [])
        return
    if config.run.deterministic:
        torch.use_deterministic_algorithms(True)
    keep_freed_memory(context.device)
    stop = StopRequest()
    stop.listen(config.checkpoint.grace_seconds)
    try:
        with stop.exiting():
            context.start(config.parallel.timeout_seconds, always=engine != "local")
        watch = Watch(context, config.run.folder / "hang", request_stop)
        watch.start()
        stop.on_signal(watch.report_stop)
        stopped, trained, folder = None, False, RunFolder(config.run.folder)
        try:
            trained = _train(config, context, stop, watch, folder, start, arguments.allow_change)
        except Stopped as request:
            stopped = request.with_traceback(None)  # whose frames hold the model
        except BaseException:
            if not context.is_distributed:  # else it goes on until the process has left
                watch.stop()
            raise
        finally:
            folder.release()
        watch.stop()
        context.stop()
        if stopped:
            raise stopped
        # Everything is saved, and nobody watches or waits any more: a report may take its time, and may fail.
        if context.is_main and (trained or not (config.run.folder / "report.html").exists()):
            _report(config.run.folder)
    finally:
        stop.close()


def _train(
    config: Config,
    context: Context,
    stop: StopRequest,
    watch: Watch,
    folder: RunFolder,
    start: "_Start",
    allowed: Sequence[str],
) -> bool:
    """Train to the end; False if the run was complete already."""
    watch.heartbeat("taking the run folder", config.parallel.timeout_seconds)
    context.on_rank_zero(folder.take_if_present)
    watch.heartbeat("reading the checkpoint", config.parallel.timeout_seconds)
    checkpoint = resumable(config.run.folder, context)
    if checkpoint is None and start.source:
        checkpoint = branch_point(start.source, start.step, context)
    changes = context.on_all_ranks(lambda: refuse_changes(config, checkpoint, allowed) if checkpoint else [])
    if checkpoint and checkpoint.state.step >= config.train.steps and not checkpoint.state.evaluation_due:
        more = "a larger train.steps with --allow-change train.steps trains on"
        log.info("%s is complete at step %d; %s", config.run.folder, checkpoint.state.step, more)
        return False
    watch.heartbeat("preparing the data", math.inf)
    data = _prepare(config, stop, checkpoint)
    watch.barrier("prepared")
    watch.heartbeat("building the model", config.parallel.timeout_seconds)
    asked = any(context.gather(data is None or stop.signal is not None))
    if data is None or asked:
        raise Stopped(NOTHING_LOST)
    # Rank events collect garbage; what is there by now (half a million objects of torch alone) is none, look no more.
    gc.collect()
    gc.freeze()
    trainer = build(config, context, data, checkpoint, stop=stop, heartbeat=watch.heartbeat, before_save=folder.check)
    # Only now, when nothing is left to complain of, is the run folder touched.
    monitors = context.on_rank_zero(folder.open, config, checkpoint) or Monitors()
    _tell_start(config, checkpoint, changes)
    try:
        trainer.run(monitors)
    finally:
        monitors.close()
    return True


@dataclass(frozen=True)
class _Start:
    """Where a run folder without checkpoints begins: at step 0, or in a checkpoint of another run.

    Attributes:
        source: the other run folder; None: at step 0.
        step: of the checkpoint; None: the newest.
    """

    source: Path | None
    step: int | None

    def peek(self) -> Checkpoint | None:
        """The checkpoint to branch off, as ``peek_checkpoint``.

        Raises:
            UserError: there is none.
        """
        if self.source is None:
            return None
        check_run_folder(self.source)
        found = peek_checkpoint(self.source, self.step)
        if found is None:
            raise UserError(f"{self.source} holds no checkpoint to branch off; write --from with a run that has one")
        return found

    def refuse_finished(self, config: Config, seen: Checkpoint) -> None:
        """Refuse to branch off where nothing is left to train."""
        if not seen.is_in(config.run.folder) and seen.state.step >= config.train.steps:
            raise UserError(
                f"train.steps is {config.train.steps}, and {seen.folder} is of step {seen.state.step} already; write a "
                "larger train.steps with --allow-change train.steps, or an earlier --from-step"
            )


def _start_of(config: Config, arguments: argparse.Namespace) -> _Start:
    source, step = arguments.source, arguments.from_step
    if source is None and step is None:
        return _Start(None, None)
    if source is None:
        source = load_config(arguments.config)[0].run.folder
    if os.path.realpath(source) == os.path.realpath(config.run.folder):
        raise UserError(
            f"run.dir is {config.run.folder}, the folder that --from{'' if arguments.source else '-step'} is to branch "
            "off; write --run.dir with another folder"
        )
    return _Start(source, step)


def _tell_start(config: Config, checkpoint: Checkpoint | None, changes: Sequence[Change]) -> None:
    """Say what a run goes on from, and with what it does so differently."""
    if checkpoint is None:
        return
    step, branches = checkpoint.state.step, not checkpoint.is_in(config.run.folder)
    if branches:
        log.info("branching off %s", checkpoint.folder)
    for change in changes:
        if not (branches and change.key == "run.dir"):
            log.info("%s was %s up to step %d, now it is %s", change.key, change.was, step, change.now)
    if jump := learning_rate_jump(config, checkpoint, changes):
        log.warning("warning: %s", jump)


def _prepare(config: Config, stop: StopRequest, checkpoint: Checkpoint | None) -> Prepared | None:
    """The data; None where this process was asked to stop meanwhile, or heard that another one was."""
    try:
        with stop.raising():
            saved = Tokenizer.load(checkpoint.tokenizer_file) if checkpoint else None
            return prepare(config.data, config.tokenizer, config.model.max_seq_len, saved_tokenizer=saved)
    except Stopped:
        return None


def _report(folder: Path) -> None:
    """Write the report of a finished run, which does not fail for want of one."""
    try:
        with phase("drawing the report"):
            file = write_report(folder)
        log.info("report: %s", file)
    except Exception as error:
        log.warning("warning: the run is complete, but its report was not written (%s)", error or repr(error))
        log.warning("warning: once that is mended, inrank report --run %s writes it", folder)
