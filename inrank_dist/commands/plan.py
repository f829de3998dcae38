"""``inrank plan``: what a config would take, without the hardware."""

import argparse
from collections.abc import Mapping, Sequence

from rich.table import Table
from torch import nn

from ..bench.common import MIB
from ..config import Config
from ..engine.cost import Setup, held_bytes, sent_bytes
from ..errors import UserError
from ..lowrank.convert import LayerLayout, Layout, convert
from ..models import LanguageModel, flops_per_token
from ..train.start import cost_setup, dense_skeleton, layer_shapes, start_layout
from .common import add_config_arguments, at_least_one, console, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--config FILE [--world-size N] [--rank R] [--section.key VALUE ...]``."""
    add_config_arguments(parser)
    parser.add_argument("--world-size", metavar="N", type=int, default=1, help="processes (default 1)")
    parser.add_argument(
        "--rank",
        metavar="R",
        type=int,
        help="rank of every layer after the freeze (default: the highest that lowrank.max_rank_fraction allows)",
    )


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Print parameters, arithmetic, memory and communication: dense, at the start, at the end."""
    config = read_config(arguments, overrides)
    if config is None:
        return
    at_least_one(arguments, "world_size", "rank")
    show_plan(config, arguments.world_size, arguments.rank)


def show_plan(config: Config, world_size: int, rank: int | None) -> None:
    """Print the plan of a run on so many processes.

    Raises:
        UserError: the settings do not fit each other or the number of processes.
    """
    skeleton = dense_skeleton(config.model, config.tokenizer.vocab_size)
    shapes = layer_shapes(skeleton, config.lowrank)
    setup = cost_setup(config, world_size)
    stages = _stages(config, shapes, rank)
    train = config.train
    tokens = train.global_batch_size * config.model.max_seq_len
    screen = console(width=160)

    def say(line: str) -> None:
        screen.print(line, highlight=False, soft_wrap=True)

    say(
        f"{config.model.name}: {_millions(skeleton)}M parameters dense, vocabulary {config.tokenizer.vocab_size}, "
        f"{len(shapes)} layers factored (lowrank.mode {config.lowrank.mode})"
    )
    say(
        f"{train.steps} steps of {train.global_batch_size} sequences of {config.model.max_seq_len} tokens: "
        f"{train.steps * tokens / 1e6:.1f}M tokens"
    )
    say(
        f"engine {setup.kind}, {world_size} process(es), {setup.accumulation} micro-batch(es) of "
        f"{train.micro_batch_size} a step; per process:"
    )
    screen.print(_table(config, skeleton, stages, setup))
    say(
        "held: between backward pass and optimizer step, float32, the process with the most rows; activations, what is "
        "gathered for the block at work and buckets of gradients come on top"
    )
    say("sent: in one step, as rings send it; MFLOP: forward and backward of one token")


def _stages(config: Config, shapes: dict[str, tuple[int, int]], rank: int | None) -> dict[str, Layout]:
    """Heading -> layout of each stage of the run."""
    settings = config.lowrank
    if rank is not None and not settings.grows:
        raise UserError(f"--rank is {rank} but with lowrank.mode {settings.mode} no rank grows; leave it out")
    stages: dict[str, Layout] = {"dense": {}}
    if not shapes:
        return stages
    start = start_layout(shapes, settings)
    modes = max(layer.modes for layer in start.values())
    base = " with base" if settings.base != "none" else ""
    stages[f"at the start\n{modes} modes{base}"] = start
    stays = settings.base == "frozen"
    if not settings.grows:
        if base and not stays:
            stages[f"without base\n{modes} modes"] = _with_modes(start, dict.fromkeys(start, modes), base=False)
        return stages
    caps = {name: settings.rule.cap(min(shape)) for name, shape in shapes.items()}
    final = {name: caps[name] if rank is None else rank for name in shapes}
    for name, cap in caps.items():
        if final[name] > cap:
            raise UserError(
                f"--rank is {rank} but lowrank.max_rank_fraction {settings.max_rank_fraction} caps the rank of {name} "
                f"at {cap}; write at most {cap}"
            )
    if settings.mode == "inrank":
        final = {name: settings.rule.modes(each, min(shapes[name])) for name, each in final.items()}
    when = "after the freeze" if settings.mode == "efficient" else "grown"
    highest = "at most " if rank is None else ""
    heading = f"{when}\n{highest}{max(final.values())} modes{base if stays else ''}"
    return stages | {heading: _with_modes(start, final, base=stays)}


def _with_modes(layout: Layout, modes: Mapping[str, int], *, base: bool) -> Layout:
    return {name: LayerLayout(modes[name], modes[name], base) for name in layout}


def _table(config: Config, skeleton: LanguageModel, stages: Mapping[str, Layout], setup: Setup) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for heading in stages:
        table.add_column(heading, justify="right", no_wrap=True)
    models = [convert(skeleton, layout) for layout in stages.values()]
    held = [held_bytes(model, setup) for model in models]
    flops = [flops_per_token(model, config.model.max_seq_len) for model in models]
    rows = {
        "parameters": [f"{_millions(model)}M" for model in models],
        "MFLOP per token": [f"{each / 1e6:.1f}" for each in flops],
        "of dense": [f"{each / flops[0]:.3f}" for each in flops],
        "held, MiB": [_mib(each.total) for each in held],
        "  parameters": [_mib(each.parameters) for each in held],
        "  gradients": [_mib(each.gradients) for each in held],
        "  moments": [_mib(each.moments) for each in held],
        "  on the CPU": [_mib(each.host) for each in held] if any(each.host for each in held) else [],
        "kept gathered, at most": [_mib(each.gathered) for each in held] if held[0].gathered else [],
        "sent, MiB a step": [_mib(sent_bytes(model, setup)) for model in models],
    }
    for name, cells in rows.items():
        if cells:
            table.add_row(name, *cells)
    return table


def _millions(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}"


def _mib(size: float) -> str:
    return f"{size / MIB:.1f}"
