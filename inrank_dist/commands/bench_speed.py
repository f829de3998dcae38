"""``inrank bench speed``: full rank compared with low rank."""

import argparse
import typing
from collections.abc import Sequence

from ..bench.decision import SHAPES
from ..bench.speed import ABLATION, STANDARD, Form, Outcome, Shape, measure_speed
from ..bench.speed_table import as_record, as_table, conclusion, notes, title, verdict
from ..data.settings import MIN_VOCABULARY
from ..engine.settings import EngineName, ParallelSettings
from ..runtime.context import Context
from ..runtime.errors import UserError
from ..runtime.home import path_argument
from ..train.memory import keep_freed_memory
from .common import at_least_one, console, refuse_unwritable, write_record

TIMEOUT_SECONDS = 3600
WIDTHS = "512,1024,2048,4096"
MODELS = {name if name == "1.3b" else f"gpt2-{name}": (shape.hidden, shape.blocks) for name, shape in SHAPES.items()}
"""Name -> width and number of layers, with the vocabulary of GPT-2."""

DESCRIPTION = """Steps of the full-rank model and of its low-rank forms, on the same batch, in alternating rounds: fixed
rank, InRank before and after the freeze, with and without joined factors that read the same input, with and without
torch.compile, and a CoLA-style bottleneck with an activation between the factors, at the same rank. Runs in one process
or under torchrun, which also counts what ddp, fsdp and zero3 send."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subject."""
    parser.add_argument("--widths", metavar="LIST", help=f"widths to measure (default {WIDTHS})")
    parser.add_argument(
        "--models",
        metavar="LIST",
        help=f"instead of widths: of {', '.join(MODELS)}, all with GPT-2's vocabulary of 50257",
    )
    parser.add_argument("--layers", metavar="N", type=int, help="blocks at each width (default 1)")
    parser.add_argument("--vocab", metavar="N", type=int, help="vocabulary size (default 8192)")
    parser.add_argument("--seq", metavar="N", type=int, default=256, help="tokens per sequence (default 256)")
    parser.add_argument("--batch", metavar="N", type=int, default=2, help="sequences per process (default 2)")
    parser.add_argument("--targets", metavar="LIST", default="mlp,all", help="mlp, all or both (default both)")
    parser.add_argument("--rank", metavar="R", type=int, help="rank of every layer (default: a quarter of the width)")
    parser.add_argument(
        "--buffer", metavar="B", type=int, default=64, help="modes beyond the rank before the freeze (default 64)"
    )
    parser.add_argument("--rounds", metavar="N", type=int, default=5, help="rounds of every form (default 5)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default fp32")
    parser.add_argument("--engine", default="auto", help="as parallel.engine (default auto)")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled forms")
    parser.add_argument(
        "--forms",
        metavar="NUMBERS",
        help="rows of the table, such as 1,2,6,7 (default all); the first must be a full-rank one",
    )
    parser.add_argument(
        "--ablation", action="store_true", help="other rows: the effect of each step from growing to frozen, compiled"
    )
    parser.add_argument("--json", metavar="FILE", type=path_argument, help="also write all measurements to this file")


def run(arguments: argparse.Namespace) -> None:
    """Measure and print a table for each shape and choice of targets."""
    at_least_one(arguments, "layers", "vocab", "seq", "batch", "rank", "buffer", "rounds")
    if arguments.vocab is not None and arguments.vocab < MIN_VOCABULARY:
        raise UserError(f"--vocab is {arguments.vocab}; write at least {MIN_VOCABULARY}")
    known = typing.get_args(EngineName)
    if arguments.engine not in ("auto", *known):
        raise UserError(f"--engine is {arguments.engine}; write auto or one of {', '.join(known)}")
    shapes = _shapes(arguments)
    forms = _forms(arguments)
    refuse_unwritable(arguments.json)
    context = Context()
    if context.device.type == "cuda":
        forms = tuple(form for form in forms if form.fused_adam)  # torch's plain AdamW keeps its steps on the CPU
    engine: EngineName = ParallelSettings(engine=arguments.engine).resolve(context.world_size)
    keep_freed_memory(context.device)
    context.start(TIMEOUT_SECONDS, always=engine != "local")
    outcomes: list[Outcome] = []
    for shape in shapes:
        outcome = measure_speed(
            shape,
            forms,
            context,
            engine=engine,
            bf16=arguments.precision == "bf16",
            rounds=arguments.rounds,
        )
        outcomes.append(outcome)
        context.on_rank_zero(_show, outcome)
    context.on_rank_zero(_conclude, outcomes, context, arguments)
    context.stop()


def _show(outcome: Outcome) -> None:
    screen = console(width=200)
    screen.print("\n" + title(outcome), highlight=False, soft_wrap=True)
    screen.print(as_table(outcome))
    if line := verdict(outcome):
        screen.print(line, highlight=False, soft_wrap=True)


def _conclude(outcomes: Sequence[Outcome], context: Context, arguments: argparse.Namespace) -> None:
    screen = console(width=200)
    for line in ["", *conclusion(outcomes), *notes(outcomes, context, arguments.rounds, arguments.precision)]:
        screen.print(line, highlight=False, soft_wrap=True)
    write_record(arguments.json, as_record(outcomes, context, arguments.rounds, arguments.precision))


def _shapes(arguments: argparse.Namespace) -> list[Shape]:
    targets = _items(arguments.targets)
    for target in targets:
        if target not in ("mlp", "all"):
            raise UserError(f"--targets has {target!r}; write mlp, all or mlp,all")
    sizes: list[tuple[int, int, int]] = []
    if arguments.models:
        for option in ("widths", "layers", "vocab"):
            if getattr(arguments, option) is not None:
                raise UserError(f"--models and --{option} cannot both be given; write one of them, or --models ''")
        for name in _items(arguments.models):
            if name not in MODELS:
                raise UserError(f"--models has {name!r}; write a comma-separated list of {', '.join(MODELS)}")
            sizes.append((*MODELS[name], 50257))
    else:
        for width in _numbers("--widths", arguments.widths or WIDTHS, 8):
            sizes.append((width, arguments.layers or 1, arguments.vocab or 8192))
    for hidden, _, _ in sizes:
        if hidden % max(hidden // 64, 1):
            raise UserError(f"--widths has {hidden}; write multiples of 64, or one below 128")
        if arguments.rank and arguments.rank > hidden:
            raise UserError(f"--rank is {arguments.rank} but a width is {hidden}; write at most {hidden}")
    return [
        Shape(
            hidden,
            layers,
            vocab,
            arguments.seq,
            arguments.batch,
            target,
            arguments.rank,
            arguments.buffer,
        )
        for hidden, layers, vocab in sizes
        for target in targets
    ]


def _forms(arguments: argparse.Namespace) -> tuple[Form, ...]:
    forms: tuple[Form, ...] = ABLATION if arguments.ablation else STANDARD
    if arguments.forms:
        chosen = _numbers("--forms", arguments.forms, 1)
        if max(chosen) > len(forms):
            raise UserError(f"--forms has {max(chosen)}; the table has {len(forms)} rows, write numbers up to that")
        forms = tuple(forms[number - 1] for number in chosen)
    if arguments.no_compile:
        forms = tuple(form for form in forms if not form.compiled)
    if not any(form.model == "full" and not form.compiled for form in forms):
        raise UserError(f"--forms is {arguments.forms}, without the full-rank baseline; write 1 as well")
    return forms


def _items(text: str) -> list[str]:
    return list(dict.fromkeys(item.strip() for item in text.split(",")))


def _numbers(option: str, text: str, least: int) -> list[int]:
    for item in _items(text):
        if not (item.isascii() and item.isdecimal() and int(item) >= least):
            raise UserError(f"{option} has {item!r}; write comma-separated whole numbers of at least {least}")
    return [int(item) for item in _items(text)]
