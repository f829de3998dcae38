"""``inrank bench data``: the speed of preparing text."""

import argparse
import importlib.metadata
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from ..bench.common import spread
from ..runtime.errors import UserError
from ..runtime.home import path_argument
from .common import at_least_one, console, refuse_unwritable, write_record

DESCRIPTION = (
    "Prepare text with inrank prepare, and do the same work by hand with tokenizers and datasets.map, in alternating "
    "rounds. Needs the package transformers for its tokenizers."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``[--paths GLOB ...] [--megabytes N] [--threads N] [--rounds N] [--json FILE]``."""
    parser.add_argument(
        "--paths",
        metavar="GLOB",
        nargs="+",
        help="text files as in data.paths (default: the standard library of Python, repeated as often as needed)",
    )
    parser.add_argument("--megabytes", metavar="N", type=int, default=40, help="size of the text (default 40)")
    parser.add_argument(
        "--threads", metavar="N", type=int, help="threads, and processes of datasets.map (default: one per CPU)"
    )
    parser.add_argument("--rounds", metavar="N", type=int, default=3, help="rounds of all routes (default 3)")
    parser.add_argument("--json", metavar="FILE", type=path_argument, help="also write all measurements to this file")


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    at_least_one(arguments, "megabytes", "threads", "rounds")
    refuse_unwritable(arguments.json)
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise UserError("the package tokenizers is not installed; write pip install transformers") from None
    from ..bench.data import BLOCK_LENGTH, VOCAB_SIZE, measure_preparation
    from ..data.source_folder import cpus

    threads = arguments.threads or cpus()
    with tempfile.TemporaryDirectory(prefix="inrank-bench-") as scratch:
        texts = _texts(arguments.paths, Path(scratch))
        size, routes = measure_preparation(texts, arguments.megabytes, threads, arguments.rounds)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("", "seconds", "MB/s", "speed-up", "CPU seconds", "tokens"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    reference = statistics.median(routes[0].seconds)
    for route in routes:
        speed = [size / 1e6 / seconds for seconds in route.seconds]
        ratio = f"{reference / statistics.median(route.seconds):.2f}"
        table.add_row(
            route.name, spread(route.seconds), spread(speed), ratio, spread(route.cpu_seconds), f"{route.tokens:,}"
        )
    console(width=120).print(table)
    versions = {name: importlib.metadata.version(name) for name in ("tokenizers", "datasets", "sentencepiece")}
    print(
        f"{size / 1e6:.1f} MB, {threads} threads or processes, vocabulary {VOCAB_SIZE}, rows of {BLOCK_LENGTH} tokens; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    record = {"bytes": size, "threads": threads, "versions": versions, "routes": [vars(route) for route in routes]}
    write_record(arguments.json, record)


def _texts(paths: list[str] | None, scratch: Path) -> Iterator[str]:
    """Documents of files, or those of the standard library again and again."""
    from ..data import DataSettings
    from ..data.corpus import open_source

    data = DataSettings(source="files", paths=paths) if paths else DataSettings()
    documents = open_source(data, remember=False).read(scratch, False).train
    yield from documents
    while not paths:
        yield from documents
