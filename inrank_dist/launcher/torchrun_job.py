"""Command line of ``launch/torchrun.sh``, validated before anything is started."""

import argparse
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..commands.main import Parser
from ..runtime.errors import UserError
from ..runtime.words import plural
from .common import parse_command_line
from .network import PORT, split_endpoint


@dataclass(frozen=True)
class Job:
    """The processes to start on this node.

    Attributes:
        processes: number on this node; 0 means one per GPU, or one without GPUs.
        nodes: minimum and maximum.
        host, port: the rendezvous endpoint; None for a single node.
        node_rank: of this node, if something (such as Slurm) numbers the nodes.
        restarts: how often the processes are restarted.
        wait: seconds to wait for the other nodes.
        command: the inrank command and its arguments.
    """

    processes: int
    nodes: tuple[int, int]
    host: str | None
    port: int
    node_rank: int | None
    restarts: int
    wait: int
    command: list[str]

    @property
    def elastic(self) -> bool:
        """Whether nodes may join and leave."""
        return self.nodes[0] < self.nodes[1]

    @property
    def endpoint(self) -> str:
        """The rendezvous endpoint."""
        return f"{self.host}:{self.port}"

    @property
    def name(self) -> str:
        """A digest of the command line: equal on all nodes of a job, different for another job."""
        return hashlib.sha256(json.dumps([self.nodes, self.command]).encode()).hexdigest()[:16]


def read_job(argv: Sequence[str]) -> Job:
    """Parse the command line.

    Raises:
        UserError: with what to write instead.
    """
    parser = Parser(
        prog="launch/torchrun.sh",
        description="Run an inrank command with torchrun, on one node or several.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "one node:       launch/torchrun.sh train --config my.yaml\n"
            "two nodes:      launch/torchrun.sh -N 2 -m node1 train --config my.yaml      the same on both\n"
            "one to four:    launch/torchrun.sh -N 1:4 -m node1 train --config my.yaml    nodes join and leave\n\n"
            "Exit status: 0 done; 75 saved and stopped on request, run it again; 2 user error, reported in one line;\n"
            "1 a process or node was lost. SIGTERM, SIGINT and SIGUSR1 make the training save and stop. The run\n"
            "folder must be on storage that all nodes share. INRANK_VENV names the virtual environment (default:\n"
            ".venv of the checkout if it exists, else whatever is on PATH)."
        ),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-n", dest="processes", type=int, help="processes on this node (default: one per GPU; without GPUs one)")
    add("-N", dest="nodes", default="1", help="number of nodes, or MIN:MAX if nodes may join and leave")
    add("-m", dest="endpoint", metavar="HOST[:PORT]", help=f"rendezvous endpoint, on one node (default port: {PORT})")
    add("-k", dest="node_rank", type=int, help="rank of this node, 0 on HOST, if nodes are numbered (as by Slurm)")
    add("-r", dest="restarts", type=int, help="restarts after a failure (default: 0; 100 if nodes may join and leave)")
    add("-w", dest="wait", type=int, default=600, help="seconds to wait for the other nodes (default: 600)")
    options = parse_command_line(parser, argv)
    fewest, _, most = options.nodes.partition(":")
    if not (fewest.isdecimal() and (most or fewest).isdecimal() and 1 <= int(fewest) <= int(most or fewest)):
        raise UserError(f"-N is {options.nodes}; write a number of nodes such as 4, or a range such as 1:4")
    nodes = int(fewest), int(most or fewest)
    if options.wait < 1:
        raise UserError(f"-w is {options.wait}; write a number of seconds of at least 1")
    if options.restarts is not None and options.restarts < 0:
        raise UserError(f"-r is {options.restarts}; write 0 or more")
    if nodes[1] > 1 and not options.endpoint:
        raise UserError(
            f"-N is {options.nodes} but -m is missing; write -m HOST, the name or address of one of the nodes"
        )
    if options.node_rank is not None and not (nodes[0] == nodes[1] and 0 <= options.node_rank < nodes[0]):
        raise UserError(
            f"-k is {options.node_rank} and -N is {options.nodes}; -k numbers a fixed number of nodes from 0"
        )
    host, port = split_endpoint(options.endpoint) if options.endpoint else (None, 0)
    if nodes[1] == 1:
        host = None
    restarts = options.restarts if options.restarts is not None else 100 * (nodes[0] < nodes[1])
    return Job(options.processes or 0, nodes, host, port, options.node_rank, restarts, options.wait, options.command)


def check_batch_divides(job: Job) -> None:
    """Refuse an elastic job whose batch size some number of nodes cannot divide: it would fail when a node leaves.

    Raises:
        UserError: with a batch size that every number of nodes can divide.
    """
    if not job.elastic or job.command[0] != "train":
        return
    from ..commands import train
    from ..config import load_config

    parser = Parser(prog="inrank train", allow_abbrev=False)
    train.add_arguments(parser)
    arguments, overrides = parser.parse_known_args(job.command[1:])
    config, _ = load_config(arguments.config, overrides)
    whole, micro = config.train.global_batch_size, config.train.micro_batch_size
    sizes = [job.processes * nodes for nodes in range(job.nodes[0], job.nodes[1] + 1)]
    if any(whole % (micro * size) for size in sizes):
        smaller = [each for each in range(1, micro) if all(whole % (each * size) == 0 for size in sizes)]
        advice = [f"train.micro_batch_size {max(smaller)} (the same results)"] if smaller else []
        fewer = list(itertools.takewhile(lambda size: whole % (micro * size) == 0, sizes))
        if len(fewer) > 1:
            advice.append(f"-N {job.nodes[0]}:{job.nodes[0] + len(fewer) - 1}")
        advice.append(f"a train.global_batch_size that is a multiple of {micro * math.lcm(*sizes)}")
        raise UserError(
            f"train.global_batch_size is {whole}, which not every number of nodes from {job.nodes[0]} to "
            f"{job.nodes[1]} divides ({plural(job.processes, 'process')} each, train.micro_batch_size {micro}); write "
            f"{', or '.join(advice)}"
        )
