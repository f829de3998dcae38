"""``inrank compare``: several runs in one table and one page."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from ..report.compare import terminal_table, write_comparison
from ..report.comparison import Comparison
from ..runtime.errors import UserError
from ..runtime.home import path_argument
from ..runtime.progress import phase
from .common import console, no_overrides

log = logging.getLogger("inrank_dist")

DESCRIPTION = """\
Several runs beside each other: a table of what they reached and cost, and a page with their curves over steps, tokens,
FLOPs or time, and the settings that differ. Runs that differ in their seed only are one config: its mean and range are
shown. Runs may still be going.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``DIR DIR ... [--output FILE]``."""
    parser.description = DESCRIPTION
    parser.add_argument("folders", metavar="DIR", type=path_argument, nargs="+", help="run folders, two or more")
    parser.add_argument(
        "--output", metavar="FILE", type=path_argument, default=Path("compare.html"), help="file (default compare.html)"
    )


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the table, write the page and print its path."""
    no_overrides(rest)
    if arguments.output.is_dir():
        raise UserError(f"--output is {arguments.output}, which is a folder; write the name of a file")
    comparison = Comparison(arguments.folders)
    with phase("drawing the comparison"):
        file = write_comparison(comparison, arguments.output)
    console(width=220).print(terminal_table(comparison))
    for note in comparison.notes():
        log.warning("%s", note)
    print(file)
