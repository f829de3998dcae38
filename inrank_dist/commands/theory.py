"""``inrank theory``: small experiments after the papers."""

import argparse
import dataclasses
import logging
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from ..runtime.errors import UserError, nearest
from ..runtime.home import path_argument
from ..runtime.progress import phase
from ..theory import EXPERIMENTS
from ..theory.experiment import Finished, Progress
from ..theory.page import claim_cells, unwritable, write_result
from .common import at_least_one, console, no_overrides

log = logging.getLogger("inrank_dist")

DESCRIPTION = """\
Repeats a small experiment of a paper in float64 on the CPU and holds its claims against what is measured. Writes
result.json and a page with plots (NAME.html). Exits with 0 whether the claims hold or not. Without NAME: lists the
experiments.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``[NAME] [--output DIR] [--seed N] [--seeds COUNT]``."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "experiments:\n" + "\n".join(f"  {line}" for line in _listed())
    parser.add_argument("name", metavar="NAME", nargs="?", help="an experiment")
    parser.add_argument("--output", metavar="DIR", type=path_argument, help="folder (default: runs/theory/NAME)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="first seed (default 0)")
    parser.add_argument("--seeds", metavar="COUNT", type=int, help="number of seeds (default: that of the experiment)")


def _listed() -> list[str]:
    width = max(map(len, EXPERIMENTS))
    return [f"{name:{width}} {experiment.title}" for name, experiment in EXPERIMENTS.items()]


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Do one experiment, print its claims and write its files."""
    no_overrides(rest)
    at_least_one(arguments, "seeds")
    name = arguments.name
    if name is None:
        print("\n".join(_listed()))
        return
    if name not in EXPERIMENTS:
        raise UserError(f"{name!r} is not an experiment{nearest(name, EXPERIMENTS)}")
    if arguments.seed < 0:
        raise UserError(f"--seed is {arguments.seed}; write a whole number of at least 0")
    folder = arguments.output or Path("runs/theory") / name
    refuse_unwritable(folder)
    experiment = EXPERIMENTS[name]
    count = arguments.seeds or len(experiment.settings.seeds)
    seeds = tuple(range(arguments.seed, arguments.seed + count))
    settings = dataclasses.replace(experiment.settings, seeds=seeds)
    begin = time.monotonic()
    with phase(name) as work:
        result = experiment.run(
            settings, Progress(lambda activity, done, total: work.report(f"{name}: {activity}", done, total))
        )
    finished = Finished(name, experiment, settings, result, time.monotonic() - begin, machine())
    page, record = write_result(finished, folder)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("claim", "expected", "measured", ""):
        table.add_column(heading)
    for claim in result.claims:
        table.add_row(*claim_cells(claim))
    console(width=200).print(table)
    for note in result.notes:
        print(note)
    log.info("%.1f s; %s, %s", finished.seconds, page, record)


def machine() -> dict[str, str | int]:
    """Facts about this machine that seconds depend on."""
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def refuse_unwritable(folder: Path) -> None:
    """Create the output folder, before minutes are spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise unwritable(folder, error) from None
