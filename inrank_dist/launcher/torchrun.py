"""torchrun for the commands of inrank: finds the network, speaks in single lines, and ends as the training did.

``python -m inrank_dist.launcher.torchrun [OPTIONS] COMMAND [WORDS ...]``; ``launch/torchrun.sh`` calls it. The
processes are those of torch's own elastic agent (``torch.distributed.launcher``).
"""

import argparse
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..commands.main import Parser
from ..errors import Lost, UserError
from .network import PORT, address_towards, is_here, reachable, resolve, settings_for, shown, split_endpoint

PROGRAM = ("-m", "inrank_dist")
EXIT_STOPPED = 75
SHUTDOWN_SECONDS = 180
"""How long processes that were asked to leave may take: longer than ``checkpoint.grace_seconds``, after which they
leave by themselves."""


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
        return self.nodes[0] < self.nodes[1]


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
    add("words", metavar="COMMAND", nargs=argparse.REMAINDER, help="command of inrank with its words, passed on")
    given = parser.parse_args(list(words))
    if not given.words:
        raise UserError("no command; write launch/torchrun.sh [-n PROCESSES] COMMAND, such as train --config FILE")
    fewest, _, most = given.nodes.partition(":")
    if not (fewest.isdecimal() and (most or fewest).isdecimal() and 1 <= int(fewest) <= int(most or fewest)):
        raise UserError(f"-N is {given.nodes}; write a number of nodes such as 4, or a range such as 1:4")
    nodes = int(fewest), int(most or fewest)
    if given.processes is not None and given.processes < 1:
        raise UserError(f"-n is {given.processes}; write a number of processes of at least 1")
    if given.wait < 1:
        raise UserError(f"-w is {given.wait}; write a number of seconds of at least 1")
    if given.restarts is not None and given.restarts < 0:
        raise UserError(f"-r is {given.restarts}; write 0 or more")
    if nodes[1] > 1 and given.meet is None:
        raise UserError(
            f"-N is {given.nodes} but -m is missing; write -m HOST, the name or address of one of the nodes"
        )
    if given.node_rank is not None and not (nodes[0] == nodes[1] and 0 <= given.node_rank < nodes[0]):
        raise UserError(f"-k is {given.node_rank} and -N is {given.nodes}; -k numbers a fixed number of nodes from 0")
    host, port = split_endpoint(given.meet) if given.meet and nodes[1] > 1 else (None, 0)
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


def launch(job: Job) -> int:
    """Start the processes of this node and see them to their end.

    Returns:
        Exit status of the training.

    Raises:
        UserError: the environment does not allow it.
        Lost: other nodes did not come or went away.
    """
    _hush()
    import torch

    job = replace(job, processes=job.processes or max(torch.cuda.device_count(), 1))
    check_every_size(job)
    settings = settings_for(job.host or "localhost", job.processes)
    print(shown(settings), flush=True)
    os.environ.update(settings)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError

    signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))  # which torch's agent knows
    place = f"{job.host}:{job.port}"
    missing = (
        f"not all {job.nodes[0]} nodes met at {place} within {job.wait} s (-w); start the same command on each, and "
        f"see that they reach port {job.port} of {job.host}"
    )
    try:
        _run(job)
        return 0
    except SignalException:
        return EXIT_STOPPED
    except ChildFailedError as error:
        return _status(error.failures)
    except RendezvousClosedError:
        raise Lost(f"the job that met at {place} has ended; nothing is left to join") from None
    except (RendezvousError, dist.DistNetworkError, dist.DistStoreError) as error:
        if isinstance(error.__cause__, dist.DistNetworkError) and "EADDRINUSE" in str(error.__cause__):
            raise UserError(f"port {job.port} of {job.host} is taken; write another with -m, on every node") from None
        raise Lost(missing) from None


def _hush() -> None:
    """torch's agent says much, and with tracebacks; what matters of it we say in a line. LOGLEVEL brings it back.
    Before torch is imported; the processes that are started do not hear of it."""
    if "LOGLEVEL" in os.environ or "torch" in sys.modules:
        return
    unset = [name for name in ("LOGLEVEL", "TORCH_CPP_LOG_LEVEL") if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, "CRITICAL") | {"TORCH_CPP_LOG_LEVEL": "FATAL"})
    import torch.distributed.elastic.multiprocessing.api
    import torch.distributed.launcher.api  # noqa: F401

    logging.getLogger("torch").setLevel(logging.CRITICAL)
    for name in unset:
        del os.environ[name]


def _run(job: Job) -> None:
    from torch.distributed.launcher import api

    from .agent import guarded

    lost = f"lost the network to {job.host}:{job.port}, where the nodes meet; start the same command again"
    setattr(api, "LocalElasticAgent", guarded(job.wait + 60, lost, _status))  # noqa: B010  # mypy: no assignment to a class
    common: dict[str, Any] = {
        "min_nodes": job.nodes[0],
        "max_nodes": job.nodes[1],
        "nproc_per_node": job.processes,
        "max_restarts": job.restarts,
        "run_id": "inrank",
    }
    command = [sys.executable, "-u", *PROGRAM, *job.words]
    if job.host is None:
        config = api.LaunchConfig(**common, rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost")
        api.elastic_launch(config, command[0])(*command[1:])
        return
    address = resolve(job.host)
    bracketed = f"[{address}]" if ":" in address else address
    common |= {"rdzv_endpoint": f"{bracketed}:{job.port}", "local_addr": address_towards(address)}
    if job.node_rank is not None:
        hosts = job.node_rank == 0
        config = api.LaunchConfig(
            **common, rdzv_backend="static", rdzv_configs={"rank": job.node_rank, "timeout": job.wait}
        )
    else:
        hosts = is_here(address) and not reachable(address, job.port, 1)  # two nodes on one machine: the first
        last_call = min(job.wait, 30)  # for nodes beyond the fewest
        config = api.LaunchConfig(
            **common,
            rdzv_backend="c10d",
            rdzv_configs={
                "is_host": hosts,
                "last_call_timeout": last_call,
                # In 15 s without a sign of life a node is taken for lost.
                "join_timeout": job.wait + (30 + last_call if job.elastic else 0),
            },
        )
    if job.elastic:
        # One store for all rounds stays with the first round's process 0, and nodes that were there do not hear that
        # another one has taken its place: each round gets a store of its own.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if not hosts:
        _wait_for(job, address)
    api.elastic_launch(config, command[0])(*command[1:])


def _wait_for(job: Job, address: str) -> None:
    """Wait until the first node is up; torch itself gives up after a minute, and has no word for it."""
    start = said = time.monotonic()
    while not reachable(address, job.port, 5):
        now = time.monotonic()
        if now - start > job.wait:
            raise Lost(
                f"{socket.gethostname()} found nobody at {job.host}:{job.port} within {job.wait} s (-w); start the "
                f"same command on {job.host} as well, and see that no firewall is between"
            )
        if now - said > 30 or said == start:
            print(
                f"{socket.gethostname()}: waiting for {job.host}:{job.port} ({now - start:.0f} of {job.wait} s)",
                flush=True,
            )
            said = now
        time.sleep(0.5)


def _status(failures: dict[int, Any]) -> int:
    """Exit status from those of the processes that failed; a line on those that could not say one."""
    statuses = {rank: int(failure.exitcode) for rank, failure in failures.items()}
    if 2 in statuses.values():
        return 2
    killed = {rank: -status for rank, status in statuses.items() if status < 0 and -status != signal.SIGTERM}
    if not killed and EXIT_STOPPED in statuses.values():
        return EXIT_STOPPED
    for rank, number in killed.items():
        why = " (out of memory? see the kernel's log)" if number == signal.SIGKILL else ""
        print(
            f"process {rank} on {socket.gethostname()} was killed by {signal.Signals(number).name}{why}",
            file=sys.stderr,
        )
    return 1


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: that of the training; 2 the user's mistake; 1 a process or node was lost."""
    try:
        return launch(read_job(sys.argv[1:] if words is None else words))
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except Lost as error:
        print("error:", error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
