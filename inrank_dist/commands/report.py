"""``inrank report``: one self-contained HTML file."""

import argparse
from collections.abc import Sequence

from ..report import write_report
from ..runtime.home import path_argument
from .common import no_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--run DIR [--output FILE]``."""
    parser.add_argument("--run", metavar="DIR", type=path_argument, required=True, help="run folder")
    parser.add_argument(
        "--output", metavar="FILE", type=path_argument, help="file (default: report.html in the run folder)"
    )


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Write the report and print its path."""
    no_overrides(rest)
    print(write_report(arguments.run, arguments.output))
