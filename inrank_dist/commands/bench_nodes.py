"""``inrank bench nodes``: a health check of the nodes before a job."""

import argparse
import logging

from rich.table import Table

from ..bench.common import MIB, machine_info, spread
from ..bench.nodes import EXCHANGED_BYTES, REDUCED_BYTES, Report, measure_nodes
from ..runtime.context import Context
from ..runtime.progress import phase
from .common import at_least_one, console

log = logging.getLogger("inrank_dist")

DESCRIPTION = (
    "Check that all nodes answer and that none is slow: a matrix product in every process, a small all-reduce over "
    "all, and an exchange of each node with the next. Start it like the job: "
    "launch/torchrun.sh -N 16 -m node1 bench nodes."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``[--repeats N] [--timeout SECONDS]``."""
    parser.add_argument("--repeats", metavar="N", type=int, default=10, help="of each measurement (default 10)")
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=int, default=120, help="how long a node may take to answer (default 120)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    at_least_one(arguments, "repeats", "timeout")
    context = Context()
    context.start(arguments.timeout)
    with phase("measuring the nodes", enabled=context.is_main):
        report = measure_nodes(context, arguments.repeats)
    context.on_rank_zero(_show, report, context)
    context.stop()


def _show(report: Report, context: Context) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("node")
    for heading in ("processes", "product ms", f"{EXCHANGED_BYTES // MIB} MiB to and from the next, ms", "GB/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for node in report.nodes:
        link, rate = "-", "-"
        if node.link is not None:
            link, rate = f"{1e3 * node.link:.2f}", f"{EXCHANGED_BYTES / node.link / 1e9:.2f}"
        table.add_row(node.name, str(node.processes), f"{1e3 * node.product:.2f}", link, rate)
    screen = console(width=200)
    screen.print(table)
    machine = machine_info(context)
    if report.reduce:
        log.info(
            "all-reduce of %d MiB over %d processes: %s ms (%s, torch %s)",
            REDUCED_BYTES // MIB,
            context.world_size,
            spread([1e3 * seconds for seconds in report.reduce]),
            machine["device"],
            machine["torch"],
        )
    for message in report.slow():
        log.warning("warning: %s", message)
    if not report.slow():
        log.info("all %d node(s) answer, none is slow", len(report.nodes))
