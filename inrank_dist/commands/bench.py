"""``inrank bench``: benchmarks on this machine."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..bench.decision import SHAPES, ModelShape, Result, Workload, measure_decision
from ..bench.decision_table import as_record, as_table, notes
from ..config import Config, load_config
from ..data import check_batch_sizes
from ..runtime.context import Context
from ..runtime.errors import UserError
from ..runtime.home import path_argument
from ..runtime.words import plural
from ..train.memory import keep_freed_memory
from . import bench_data, bench_nodes, bench_parity, bench_speed
from .common import at_least_one, console, no_overrides, refuse_unwritable, write_record

if TYPE_CHECKING:
    from ..bench.checkpoint import Cost

MODULES: dict[str, tuple[Any, str]] = {
    "speed": (bench_speed, "time, memory and communication of a step, full rank against low rank (default)"),
    "parity": (bench_parity, "whether every engine and precision computes the same here as on the CPU"),
    "data": (bench_data, "MB/s of preparing text, against tokenizers and datasets.map by hand"),
    "nodes": (bench_nodes, "health check before a job: whether all nodes answer and none is slow"),
}
"""Subjects with a module of their own, and their help texts."""
TIMEOUT_SECONDS = 4 * 3600
"""How long processes wait for process 0, which measures the dense method alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``[SUBJECT] [options]``; the default subject is ``speed``."""
    subjects = parser.add_subparsers(title="subjects", metavar="SUBJECT", dest="subject", required=True)
    for name, (module, meaning) in MODULES.items():
        subject = subjects.add_parser(name, help=meaning, description=module.DESCRIPTION, allow_abbrev=False)
        module.add_arguments(subject)
    decision = subjects.add_parser(
        "decision",
        help="time and extra memory of one rank decision against the dense SVD of the published code",
        description="One rank decision: our Gram matrices against the float32 svdvals of the dense product, as "
        "published. The two MLP matrices of every block are factorised; the factors are random with a decaying "
        "spectrum. Runs in one process or under torchrun, on GPUs if there are any.",
        allow_abbrev=False,
    )
    decision.add_argument(
        "--shapes",
        metavar="NAMES",
        default=",".join(SHAPES),
        help=f"comma-separated, of {', '.join(SHAPES)} (default: all; 1.3b is 24 blocks of width 2048)",
    )
    decision.add_argument("--rank", metavar="R", type=int, default=150, help="active rank before it (default 150)")
    decision.add_argument(
        "--buffer", metavar="B", type=int, default=100, help="modes beyond the active rank (default 100, as published)"
    )
    decision.add_argument("--repeats", metavar="N", type=int, default=3, help="rounds of both methods (default 3)")
    decision.add_argument(
        "--dense-layers",
        metavar="N",
        default="8",
        help="layers to measure the dense method on, or all (default 8); with fewer than all, its time for the whole "
        "model is extrapolated and marked with ~",
    )
    decision.add_argument("--json", metavar="FILE", type=path_argument, help="also write all measurements to this file")
    checkpoint = subjects.add_parser(
        "checkpoint",
        help="time per step while saving checkpoints against without",
        description="Steps of a config's model with synchronous (sync) and asynchronous (async) saves, against steps "
        "without, in alternating rounds. Runs in one process or under torchrun. Other settings of the config are given "
        "as --section.key VALUE.",
        allow_abbrev=False,
    )
    checkpoint.add_argument("--config", metavar="FILE", required=True, help="YAML file with the settings")
    checkpoint.add_argument("--interval", metavar="N", type=int, default=20, help="steps per checkpoint (default 20)")
    checkpoint.add_argument("--rounds", metavar="N", type=int, default=5, help="rounds of each mode (default 5)")


def complete(argv: Sequence[str]) -> list[str]:
    """Insert the default subject, ``speed``, if none is given."""
    bare = not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help"))
    return ["speed", *argv] if bare else list(argv)


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Measure and print a table."""
    if arguments.subject in MODULES:
        no_overrides(rest)
        MODULES[arguments.subject][0].run(arguments)
        return
    if arguments.subject == "checkpoint":
        _checkpoint(arguments, rest)
        return
    no_overrides(rest)
    shapes, workload = _shapes(arguments.shapes), _workload(arguments)
    _check_fits(workload, shapes)
    refuse_unwritable(arguments.json)
    context = Context()
    context.start(TIMEOUT_SECONDS)
    results = [measure_decision(shape, workload, context) for shape in shapes]
    context.on_rank_zero(_show, [result for result in results if result], workload, context, arguments.json)
    context.stop()


def _checkpoint(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    # Imported here, because it imports data readers that the other subjects do not need.
    from ..bench.checkpoint import MODES, measure_checkpoints
    from ..data import prepare

    at_least_one(arguments, "interval", "rounds")
    config, _ = load_config(arguments.config, overrides)
    steps = (arguments.rounds + 1) * len(MODES) * arguments.interval
    config.train.steps = max(config.train.steps, steps)
    context = Context()
    keep_freed_memory(context.device)
    engine = config.parallel.resolve(context.world_size)
    check_batch_sizes(config.train.global_batch_size, config.train.micro_batch_size, context.world_size)
    context.start(config.parallel.timeout_seconds, always=engine != "local")
    data = prepare(config.data, config.tokenizer, config.model.max_seq_len)
    cost = measure_checkpoints(config, context, data, interval=arguments.interval, rounds=arguments.rounds)
    context.on_rank_zero(_show_cost, cost, config, context)
    context.stop()


def _show_cost(cost: "Cost", config: Config, context: Context) -> None:
    from ..bench.checkpoint import as_table as as_cost_table

    screen, model = console(width=200), config.model
    size = "" if model.num_layers is None else f" {model.num_layers} x {model.hidden_size}"
    screen.print(as_cost_table(cost))
    screen.print(
        f"{model.architecture}{size}, {plural(context.world_size, 'process')} "
        f"on {context.device.type}, torch {torch.__version__}: a checkpoint of {cost.bytes / 1e6:.1f} MB every "
        f"{cost.interval} steps, {len(cost.seconds['off'])} rounds",
        highlight=False,
        soft_wrap=True,
    )


def _show(results: Sequence[Result], workload: Workload, context: Context, file: Path | None) -> None:
    screen = console(width=200)
    screen.print(as_table(results))
    for line in notes(results, workload, context):
        screen.print(line, highlight=False, soft_wrap=True)
    write_record(file, as_record(results, workload, context))


def _shapes(text: str) -> list[ModelShape]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SHAPES:
            raise UserError(f"--shapes has {name!r}; write a comma-separated list of {', '.join(SHAPES)}")
    return [SHAPES[name] for name in dict.fromkeys(names)]


def _workload(arguments: argparse.Namespace) -> Workload:
    at_least_one(arguments, "rank", "buffer", "repeats")
    count = None
    if arguments.dense_layers != "all":
        text = arguments.dense_layers
        count = int(text) if text.isascii() and text.isdecimal() else 0
        if count < 2 or count % 2:
            raise UserError(f"--dense-layers is {text!r}; write an even number (a block has two layers) or all")
    return Workload(arguments.rank, arguments.buffer, arguments.repeats, count)


def _check_fits(workload: Workload, shapes: Sequence[ModelShape]) -> None:
    narrow = min(shapes, key=lambda shape: shape.hidden)
    cap = workload.rule.cap(narrow.hidden)
    if workload.rank > cap or workload.rank + workload.buffer > narrow.hidden:
        raise UserError(
            f"--rank is {workload.rank} and --buffer {workload.buffer}, but layers of {narrow.name} have "
            f"min(in, out) = {narrow.hidden}; write a rank of at most {cap}, and at most {narrow.hidden} with "
            "the buffer"
        )
