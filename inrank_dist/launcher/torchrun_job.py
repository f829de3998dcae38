"""What ``launch/torchrun.sh`` is asked for, and what of it can be found wrong before anything is started."""

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..commands.main import Parser
from ..runtime.errors import UserError
from .common import read_words
from .network import PORT, split_endpoint


@dataclass(frozen=True)
class Job:
    """What is to be started on this node.

    Attributes:
        processes: of this node; 0: one for each GPU, or one.
        nodes: fewest and most.
        host, port: where the nodes meet; None: there is but this one.
        node_rank: of this node, where somebody (Slurm) has numbered them.
        restarts: how often the processes are started again.
        wait: seconds for which a node waits for the others.
        words: of the command.
    """

    processes: int
    nodes: tuple[int, int]
    host: str | None
    port: int
    node_rank: int | None
    restarts: int
    wait: int
    words: list[str]

    @property
    def elastic(self) -> bool:
        """Whether nodes come and go."""
        return self.nodes[0] < self.nodes[1]

    @property
    def place(self) -> str:
        """Where the nodes meet."""
        return f"{self.host}:{self.port}"

    @property
    def name(self) -> str:
        """The same on all nodes of a job, another for another job: a digest of what they were told."""
        return hashlib.sha256(json.dumps([self.nodes, self.words]).encode()).hexdigest()[:16]


def read_job(words: Sequence[str]) -> Job:
    """The command line.

    Raises:
        UserError: with what to write instead.
    """
    parser = Parser(
        prog="launch/torchrun.sh",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "one node:       launch/torchrun.sh train --config my.yaml\n"
            "two nodes:      launch/torchrun.sh -N 2 -m node1 train --config my.yaml      the same on both\n"
            "one to four:    launch/torchrun.sh -N 1:4 -m node1 train --config my.yaml    nodes come and go\n\n"
            "Exit status: 0 done; 75 saved and stopped on request, run it again; 2 a mistake, said in one line;\n"
            "1 a process or node was lost. SIGTERM, SIGINT and SIGUSR1 make the training save and stop. The run\n"
            "folder must be on storage that all nodes share. INRANK_VENV names the virtual environment (default:\n"
            ".venv of the checkout if it is there, else what is on PATH)."
        ),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-n", dest="processes", type=int, help="processes on this node (default: one for each GPU; without GPUs one)")
    add("-N", dest="nodes", default="1", help="number of nodes, or MIN:MAX for nodes that come and go")
    add("-m", dest="meet", metavar="HOST[:PORT]", help=f"node at which all meet, the first (default port: {PORT})")
    add("-k", dest="node_rank", type=int, help="number of this node, 0 on HOST, if they are numbered (as by Slurm)")
    add("-r", dest="restarts", type=int, help="starts after a failure (default: 0; 100 where nodes come and go)")
    add("-w", dest="wait", type=int, default=600, help="seconds to wait for the other nodes (default: 600)")
    given = read_words(parser, words)
    fewest, _, most = given.nodes.partition(":")
    if not (fewest.isdecimal() and (most or fewest).isdecimal() and 1 <= int(fewest) <= int(most or fewest)):
        raise UserError(f"-N is {given.nodes}; write a number of nodes such as 4, or a range such as 1:4")
    nodes = int(fewest), int(most or fewest)
    if given.wait < 1:
        raise UserError(f"-w is {given.wait}; write a number of seconds of at least 1")
    if given.restarts is not None and given.restarts < 0:
        raise UserError(f"-r is {given.restarts}; write 0 or more")
    if nodes[1] > 1 and not given.meet:
        raise UserError(
            f"-N is {given.nodes} but -m is missing; write -m HOST, the name or address of one of the nodes"
        )
    if given.node_rank is not None and not (nodes[0] == nodes[1] and 0 <= given.node_rank < nodes[0]):
        raise UserError(f"-k is {given.node_rank} and -N is {given.nodes}; -k numbers a fixed number of nodes from 0")
    host, port = split_endpoint(given.meet) if given.meet else (None, 0)
    if nodes[1] == 1:  # it meets itself
        host = None
    restarts = given.restarts if given.restarts is not None else 100 * (nodes[0] < nodes[1])
    return Job(given.processes or 0, nodes, host, port, given.node_rank, restarts, given.wait, given.words)


def check_every_size(job: Job) -> None:
    """Refuse an elastic job whose batch some number of nodes could not divide: it would end when a node leaves.

    Raises:
        UserError: with a batch size that all can divide.
    """
    if not job.elastic or job.words[0] != "train":
        return
    from ..commands import train
    from ..config import load_config

    parser = Parser(prog="inrank train", allow_abbrev=False)
    train.add_arguments(parser)
    arguments, overrides = parser.parse_known_args(job.words[1:])
    config, _ = load_config(arguments.config, overrides)
    train_settings = config.train
    batches = [train_settings.micro_batch_size * job.processes * n for n in range(job.nodes[0], job.nodes[1] + 1)]
    if any(train_settings.global_batch_size % batch for batch in batches):
        size = math.lcm(*batches)
        raise UserError(
            f"train.global_batch_size is {train_settings.global_batch_size}, which not every number of nodes from "
            f"{job.nodes[0]} to {job.nodes[1]} divides ({job.processes} processes each, train.micro_batch_size "
            f"{train_settings.micro_batch_size}); write a multiple of {size}, or fewer nodes in -N"
        )
