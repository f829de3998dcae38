"""``inrank plan``: what a config would take, without the hardware."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table
from torch import nn

from ..config import Config
from ..engine.activations import micro_batch_activations
from ..engine.cost import FLOAT, Setup, held_bytes, most_bytes, remembered_parameters, sent_bytes
from ..lowrank.allocation import affordable_rank
from ..lowrank.convert import Layout, convert
from ..lowrank.layer import set_activation
from ..method.initial import factored_layout, layer_shapes
from ..method.starts import finds_ranks
from ..models import LanguageModel, flops_per_token
from ..runtime.errors import UserError
from ..runtime.home import path_argument
from ..runtime.words import plural
from ..train.building import cost_setup, dense_skeleton
from ..train.checkpoint import peek_checkpoint
from ..train.monitors.text import amount, size
from .common import add_config_arguments, at_least_one, console, read_config
from .plan_device import Device, Work, bound_seconds, device_named, moved_bytes

NOTES = """held: between backward pass and optimizer step, float32, the process with the most rows
activations: of one micro-batch at its worst moment, without train.compile, which takes less
at most in a step: held, activations, and what is gathered or sent; memory fragmentation and libraries take more
sent: in one step, with ring algorithms; MFLOP: forward and backward pass of one token"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--config FILE [--world-size N] [--rank R] [--ranks-from RUN] [--device D] [--section.key VALUE ...]``."""
    add_config_arguments(parser)
    parser.add_argument("--world-size", metavar="N", type=int, default=1, help="processes (default 1)")
    parser.add_argument(
        "--rank",
        metavar="R",
        type=int,
        help="rank of every layer after the freeze (default: the highest that lowrank.max_rank_fraction allows)",
    )
    parser.add_argument(
        "--ranks-from",
        metavar="RUN",
        type=path_argument,
        help="a run folder: one more column with the ranks that its newest checkpoint has",
    )
    parser.add_argument(
        "--device",
        metavar="D",
        help="h100, h200, a100, cpu (this machine), or bytes such as 24GiB: whether the run fits, and a lower bound of "
        "the time of a step",
    )


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Print parameters, arithmetic, memory and communication: dense, at the start, at the end."""
    config = read_config(arguments, overrides)
    if config is None:
        return
    at_least_one(arguments, "world_size", "rank")
    device = device_named(arguments.device, arguments.world_size) if arguments.device is not None else None
    show_plan(config, arguments.world_size, arguments.rank, arguments.ranks_from, device)


def show_plan(
    config: Config,
    world_size: int,
    rank: int | None = None,
    ranks_from: Path | None = None,
    device: Device | None = None,
) -> None:
    """Print the plan of a run on so many processes.

    Args:
        rank: of every layer at the end; None: the highest that is allowed.
        ranks_from: run folder whose ranks make one more column.
        device: what it is to run on.

    Raises:
        UserError: the settings do not fit each other or the number of processes.
    """
    skeleton = dense_skeleton(config.model, config.tokenizer.vocab_size, 0, config.lowrank)
    shapes = layer_shapes(skeleton, config.lowrank)
    setup = cost_setup(config, world_size)
    stages = _stages(config, shapes, rank)
    if ranks_from is not None:
        stages |= _stage_of_run(config, shapes, ranks_from)
    train = config.train
    tokens = train.global_batch_size * config.model.max_seq_len
    screen = console(width=160)

    def say(line: str) -> None:
        screen.print(line, highlight=False, soft_wrap=True)

    say(
        f"{config.model.architecture}: {_count(skeleton)} parameters dense, vocabulary "
        f"{skeleton.vocab_size}, {len(shapes)} layers factored (lowrank.mode {config.lowrank.mode})"
    )
    say(
        f"{train.steps} steps of {train.global_batch_size} sequences of {config.model.max_seq_len} tokens: "
        f"{amount(train.steps * tokens)} tokens"
    )
    say(
        f"engine {setup.engine}, {plural(world_size, 'process')}, in each step "
        f"{plural(setup.accumulation, 'micro-batch')} of {plural(train.micro_batch_size, 'sequence')}; per process:"
    )
    screen.print(_table(config, skeleton, stages, setup, device))
    if config.lowrank.initial_energy is not None and not config.lowrank.dense_fraction:
        say(
            "lowrank.initial_energy finds the rank of each layer when the run starts; this plan counts "
            f"lowrank.initial_rank {config.lowrank.initial_rank}"
        )
    if config.lowrank.grows and not config.lowrank.dense_fraction:
        say(
            "at the start: ranks grow from here, so steps become slower until the freeze"
            if config.lowrank.freezes
            else "at the start: ranks grow from here, so steps become slower"
        )
    for line in NOTES.splitlines():
        say(line)
    if device is not None:
        say(_about(device, setup))


def _about(device: Device, setup: Setup) -> str:
    """What the rows about a device assume."""
    room = f"{device.name}: {device.memory / 1e9:.1f} GB"
    if device.usable < 1:
        room += f", of which {device.usable:.0%} are counted on"
    flops = device.bf16 if setup.bf16 else device.float32
    if flops is None or device.bandwidth is None:
        return f"{room}; no figures of its speed, so no time"
    precision = "bf16" if setup.bf16 else "float32"
    return (
        f"{room}; a step takes the longest of arithmetic at {flops / 1e12:.0f} TFLOP/s ({precision}), memory at "
        f"{device.bandwidth / 1e12:.2f} TB/s and network (450 or 300 GB/s in a node of 8, 50 GB/s between nodes), "
        "perfectly overlapped: a bound, not a forecast. One H200 took 2.3 to 7.5 times as long at full rank and 3.3 to "
        "17 times at low rank (bf16, widths 1024 and 2048, 4 and 24 sequences of 1024)"
    )


def _stages(config: Config, shapes: dict[str, tuple[int, int]], rank: int | None) -> dict[str, Layout]:
    """Heading -> layout of each stage of the run."""
    settings = config.lowrank
    if rank is not None and not settings.grows:
        raise UserError(f"--rank is {rank} but with lowrank.mode {settings.mode} no rank grows; leave it out")
    stages: dict[str, Layout] = {"dense": {}}
    if not shapes:
        return stages
    found = finds_ranks(settings)  # by the weights of a run: their largest
    largest = {name: settings.rule.cap(min(shape)) for name, shape in shapes.items()} if found else None
    start = factored_layout(shapes, settings, largest)
    modes = max(layer.modes for layer in start.values())
    base = " with base" if settings.base != "none" else ""
    if not settings.dense_fraction:
        stages[f"at the start\n{modes} modes{base}"] = start
    elif not settings.grows:
        when = f"after step {settings.dense_steps(config.train.steps)}" + (
            " at the latest" if settings.dense_until == "stable_rank" else ""
        )
        stages[f"{when}\n{'at most ' if found else ''}{modes} modes"] = start
    stays = settings.base == "frozen"
    if not settings.grows:
        if base and not stays:
            stages[f"without base\n{modes} modes"] = _with_modes(start, dict.fromkeys(start, modes), base=False)
        return stages
    caps = {name: settings.rule.cap(min(shape)) for name, shape in shapes.items()}
    budget = settings.final_budget if settings.freezes and settings.has_budget and rank is None else None
    final = {name: caps[name] if rank is None else rank for name in shapes}
    if budget is not None:  # the same share in every layer; the run divides it by the spectra
        final = {name: max(min(cap, affordable_rank(shapes[name], budget)), 1) for name, cap in caps.items()}
    for name, cap in caps.items():
        if final[name] > cap:
            raise UserError(
                f"--rank is {rank} but lowrank.max_rank_fraction {settings.max_rank_fraction} caps the rank of {name} "
                f"at {cap}; write at most {cap}"
            )
    if settings.grows and not settings.freezes:
        final = {name: settings.rule.modes(each, min(shapes[name])) for name, each in final.items()}
    when = "after the freeze" if settings.freezes else "grown"
    # What the rule finds is mostly far below: a bound, said in both lines of the heading.
    when, highest = (f"{when}, upper bound", "at most ") if rank is None else (when, "")
    if budget is not None:
        when, highest = f"after the freeze, final_budget {budget:g}", f"about {min(final.values())} to "
    heading = f"{when}\n{highest}{max(final.values())} modes{base if stays else ''}"
    return stages | {heading: _with_modes(start, final, base=stays)}


def _stage_of_run(config: Config, shapes: dict[str, tuple[int, int]], run_folder: Path) -> dict[str, Layout]:
    """The column of the ranks that another run has come to, as the settings would hold them."""
    settings = config.lowrank
    if not shapes:
        raise UserError(f"--ranks-from is {run_folder} but lowrank.mode {settings.mode} has no ranks; leave it out")
    checkpoint = peek_checkpoint(run_folder)
    if checkpoint is None:
        raise UserError(f"--ranks-from is {run_folder}, which holds no checkpoint; write the folder of a training run")
    layout = checkpoint.state.layout
    differing = sorted(layout.keys() ^ shapes.keys())
    if differing:
        raise UserError(
            f"--ranks-from is {run_folder}, whose low-rank layers are others than those of the settings (such as "
            f"{differing[0]}); write a run of the same model and lowrank.targets"
        )
    for name, layer in layout.items():
        if layer.rank > min(shapes[name]):
            raise UserError(
                f"--ranks-from is {run_folder}, where {name} has rank {layer.rank}, but here it is "
                f"{shapes[name][0]} x {shapes[name][1]}; write a run of the same model"
            )
    ends = settings.freezes or not settings.grows
    modes = {
        name: layer.rank if ends else settings.rule.modes(layer.rank, min(shapes[name]))
        for name, layer in layout.items()
    }
    mean = sum(layer.rank for layer in layout.values()) / len(layout)
    heading = f"ranks of {run_folder.name}, step {checkpoint.state.step}\nmean {mean:.1f}"
    stays = settings.base == "frozen"
    like = factored_layout(shapes, settings)
    return {
        heading: {
            name: dataclasses.replace(like[name], rank=layer.rank, modes=modes[name], base=stays)
            for name, layer in layout.items()
        }
    }


def _with_modes(layout: Layout, modes: Mapping[str, int], *, base: bool) -> Layout:
    return {
        name: dataclasses.replace(layer, rank=modes[name], modes=modes[name], base=base)
        for name, layer in layout.items()
    }


def _table(
    config: Config, skeleton: LanguageModel, stages: Mapping[str, Layout], setup: Setup, device: Device | None
) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for heading in stages:
        table.add_column(heading, justify="right", no_wrap=True)
    train, seq_len = config.train, config.model.max_seq_len
    models = [convert(skeleton, layout) for layout in stages.values()]
    for model in models:
        set_activation(model, config.lowrank.activation)
    held = [held_bytes(model, setup) for model in models]
    flops = [flops_per_token(model, seq_len) for model in models]
    activations = [
        micro_batch_activations(
            model,
            train.micro_batch_size,
            seq_len,
            bf16=setup.bf16,
            checkpointing=train.activation_checkpointing,
            on_gpu=device is None or not device.is_cpu,
        )
        for model in models
    ]
    most = [most_bytes(model, setup, each) for model, each in zip(models, activations, strict=True)]
    sent = [sent_bytes(model, setup) for model in models]
    rows = {
        "parameters": [_count(model) for model in models],
        "MFLOP per token": [f"{each / 1e6:.1f}" for each in flops],
        "FLOPs of dense": [f"{each / flops[0]:.3f}" for each in flops],
        "held": [size(each.total) for each in held],
        "  parameters": [size(each.parameters) for each in held],
        "  gradients": [size(each.gradients) for each in held],
        "  moments": [size(each.moments) for each in held],
        "  on the CPU": [size(each.host) for each in held] if any(each.host for each in held) else [],
        "kept gathered, at most": [size(each.gathered) for each in held] if held[0].gathered else [],
        "activations": [size(each.peak) for each in activations],
        "at most in a step": [size(each) for each in most],
        "sent in a step": [size(each) for each in sent],
    }
    if device is not None:
        rows["fits, share of the memory"] = [
            f"{'yes' if each <= device.room else 'no'} {each / device.memory:.2f}" for each in most
        ]
        tokens = setup.accumulation * train.micro_batch_size * seq_len
        again = 4 / 3 if train.activation_checkpointing else 1.0  # the forward pass is a third of forward and backward
        bounds = []
        for index, model in enumerate(models):
            tensors = model.parameters(), _trained(model), remembered_parameters(model, setup.optimizer)
            P, T, M = (FLOAT * sum(p.numel() for p in each) for each in tensors)
            moved = moved_bytes(activations[index].peak, P, T, M, setup)
            bounds.append(bound_seconds(Work(again * flops[index] * tokens, moved, sent[index]), device, setup))
        if bounds[0]:
            rows["time of a step, lower bound, ms"] = [f"{1e3 * max(each.values()):.1f}" for each in bounds]
            rows |= {f"  {name}": [f"{1e3 * each[name]:.1f}" for each in bounds] for name in bounds[0]}
    for name, cells in rows.items():
        if cells:
            table.add_row(name, *cells)
    return table


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _count(model: nn.Module) -> str:
    return amount(sum(parameter.numel() for parameter in model.parameters()))
