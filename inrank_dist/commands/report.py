"""``inrank report``: one self-contained HTML file, or an SVG image."""

import argparse
from collections.abc import Sequence

from ..report import write_report
from ..report.picture import write_picture
from ..runtime.home import path_argument
from ..runtime.progress import phase
from .common import no_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--run DIR [--output FILE]``."""
    parser.add_argument("--run", metavar="DIR", type=path_argument, required=True, help="run folder")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=path_argument,
        help="file (default: report.html in the run folder); a FILE that ends in .svg is an image of the loss and the "
        "ranks",
    )


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Write the report, or the image, and print its path."""
    no_overrides(rest)
    output = arguments.output
    write = write_picture if output is not None and output.suffix == ".svg" else write_report
    with phase(f"drawing the report of {arguments.run}"):
        file = write(arguments.run, output)
    print(file)
