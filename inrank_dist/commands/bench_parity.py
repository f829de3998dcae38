"""``inrank bench parity``: checks that every way to train computes the same here as on the CPU."""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from rich.table import Table

from ..bench.parity import CASES, Bench, Parity, is_supported
from ..runtime.errors import JobFailed, UserError
from ..runtime.home import path_argument
from .common import at_least_one, console, refuse_unwritable, write_record

DESCRIPTION = (
    "Small whole runs with two growth events and the freeze, with every engine, precision and mode of this machine, "
    "against one process on its CPU: the largest relative difference of a step's loss, and whether the ranks are the "
    "same. Exit status 1 if a case does not hold."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``[--only NAMES] [--workers N] [--timeout SECONDS] [--json FILE]``."""
    parser.add_argument("--only", metavar="NAMES", help="comma-separated prefixes of case names (default: all)")
    parser.add_argument("--workers", metavar="N", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--timeout", metavar="SECONDS", type=int, default=300, help="of one run (default 300)")
    parser.add_argument("--json", metavar="FILE", type=path_argument, help="also write the results to this file")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print a table, and fail if a case does."""
    at_least_one(arguments, "workers", "timeout")
    refuse_unwritable(arguments.json)
    wanted = [name.strip() for name in (arguments.only or "").split(",") if name.strip()]
    cases = tuple(case for case in CASES if not wanted or any(case.name.startswith(name) for name in wanted))
    if not cases:
        raise UserError(f"--only is {arguments.only}; write prefixes of {'; '.join(case.name for case in CASES)}")
    if skipped := [case.name for case in cases if not is_supported(case)]:
        print(f"left out, for want of a GPU, DeepSpeed or transformers: {'; '.join(skipped)}")
        cases = tuple(case for case in cases if is_supported(case))
    results: list[Parity] = []
    with tempfile.TemporaryDirectory(prefix="inrank-parity-") as folder:
        for result in Bench(Path(folder), arguments.timeout, arguments.workers).measure(cases):
            results.append(result)
            print(f"{result.case.name}: {_summary(result)}", flush=True)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, heading in enumerate(("", "largest relative difference", "limit", "ranks", "seconds", "")):
        table.add_column(heading, justify="left" if index in (0, 3, 5) else "right", no_wrap=True)
    for result in results:
        table.add_row(
            result.case.name,
            f"{result.difference:.1e}",
            f"{result.case.limit:.0e}",
            "same" if result.same_ranks else "different",
            f"{result.seconds:.1f}",
            "holds" if result.holds else "DOES NOT HOLD",
        )
    console(width=200).print(table)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{device}, torch {torch.__version__}, against one process on the CPU")
    record = {
        "device": device,
        "torch": torch.__version__,
        "cases": {
            result.case.name: {
                "difference": None if math.isnan(result.difference) else result.difference,
                "limit": result.case.limit,
                "same_ranks": result.same_ranks,
                "holds": result.holds,
                "failure": result.failure,
            }
            for result in results
        },
    }
    write_record(arguments.json, record)
    if failed := [result.case.name for result in results if not result.holds]:
        raise JobFailed(f"does not compute the same as on the CPU: {'; '.join(failed)}")


def _summary(result: Parity) -> str:
    if result.failure:
        return f"failed ({result.failure})"
    ranks = "the same" if result.same_ranks else "different"
    return f"{result.difference:.1e}, {ranks} ranks, {result.seconds:.1f} s"
