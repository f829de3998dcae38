"""Runs inrank commands with torchrun: finds the network, reports errors in one line, returns the command's exit status.

``python -m inrank_dist.launcher.torchrun [OPTIONS] COMMAND [ARGUMENTS ...]``; ``launch/torchrun.sh`` calls it. The
processes are started by torch's elastic agent (``torch.distributed.launcher``).
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import psutil

from ..runtime import console
from ..runtime.console import write_stderr
from ..runtime.errors import EXIT_MISTAKE, JobFailed, UserError
from ..runtime.signals import EXIT_STOPPED, STOP_SIGNALS, stop_signals
from .common import SHUTDOWN_SECONDS, Outcome, describe_kill
from .network import LOOPBACK, address_towards, describe_settings, resolve, settings_for
from .torchrun_job import Job, check_batch_divides, read_job

PROGRAM = ("-m", "inrank_dist")

_outcome = Outcome()


def launch(job: Job) -> int:
    """Start the processes of this node and wait for them.

    Returns:
        Exit status of the command.

    Raises:
        UserError: the environment does not allow it.
        JobFailed: other nodes did not join, or were lost.
    """
    _silence_torch_logging()
    import torch

    job = replace(job, processes=job.processes or max(torch.cuda.device_count(), 1))
    check_batch_divides(job)
    address = resolve(job.host or LOOPBACK)
    settings = settings_for(address, job.processes)
    print(describe_settings(settings), flush=True)
    os.environ.update(settings)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError

    try:
        _run(job, address)
        return 0
    except SignalException:
        return _status_after_stop()
    except ChildFailedError as error:
        return _status({rank: int(failure.exitcode) for rank, failure in error.failures.items()})
    except RendezvousClosedError:
        raise JobFailed(f"the job that met at {job.endpoint} has ended; nothing is left to join") from None
    except (RendezvousError, dist.DistNetworkError, dist.DistStoreError):
        raise JobFailed(_missing_nodes(job)) from None


def listen() -> None:
    """Handle stop requests. While no training process runs, exit at once with status 75, because there is nothing to
    save. Otherwise turn the request into SIGTERM, which torch's agent forwards.

    This needs a thread: the main thread may wait in C++ for other nodes, where Python's signal handlers do not run.
    """
    read_end, write_end = socket.socketpair()
    write_end.setblocking(False)
    for number in stop_signals():
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)

    def handle() -> None:
        with write_end:
            while received := read_end.recv(1):
                if received[0] not in STOP_SIGNALS:
                    continue
                if not psutil.Process().children():
                    if _outcome.final is not None:
                        os._exit(_outcome.final)
                    write_stderr("stopped while no training was running; the same command starts or resumes it")
                    os._exit(EXIT_STOPPED)
                if received[0] != signal.SIGTERM:
                    os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=handle, name="signals", daemon=True).start()


def _silence_torch_logging() -> None:
    """Silence torch's agent, which logs tracebacks; we report what matters in one line. LOGLEVEL restores its output.

    Must run before torch is imported. The training processes are not affected.
    """
    if "LOGLEVEL" in os.environ or "torch" in sys.modules:
        return
    unset = [name for name in ("LOGLEVEL", "TORCH_CPP_LOG_LEVEL") if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, "CRITICAL") | {"TORCH_CPP_LOG_LEVEL": "FATAL"})
    import torch.distributed.elastic.multiprocessing.api
    import torch.distributed.launcher.api  # noqa: F401

    logging.getLogger("torch").setLevel(logging.CRITICAL)
    for name in unset:
        del os.environ[name]


def _run(job: Job, address: str) -> None:
    from torch.distributed.launcher import api

    from .agent import agent_class
    from .rendezvous import join, single_node_store

    common: dict[str, Any] = {
        "min_nodes": job.nodes[0],
        "max_nodes": job.nodes[1],
        "nproc_per_node": job.processes,
        "max_restarts": job.restarts,
        "run_id": job.name,
    }
    store = None
    if job.host is None:
        local_store = single_node_store()  # must outlive the agent, or torch would create its own
        common |= {"rdzv_endpoint": f"{LOOPBACK}:{local_store.port}", "local_addr": LOOPBACK}
        config = api.LaunchConfig(**common, rdzv_backend="static", rdzv_configs={"rank": 0, "timeout": job.wait})
    else:
        store = join(job, address)
        bracketed = f"[{address}]" if ":" in address else address
        common |= {"rdzv_endpoint": f"{bracketed}:{job.port}", "local_addr": address_towards(address)}
        if job.node_rank is not None:
            static = {"rank": job.node_rank, "timeout": job.wait}
            config = api.LaunchConfig(**common, rdzv_backend="static", rdzv_configs=static)
        else:
            last_call = min(job.wait, 30)  # how long to wait for nodes beyond the minimum
            timeouts = {
                "is_host": False,  # join() has created the store
                "last_call_timeout": last_call,
                # torch takes 15 s without a heartbeat to declare a node dead.
                "join_timeout": job.wait + (30 + last_call if job.elastic else 0),
            }
            config = api.LaunchConfig(**common, rdzv_backend="c10d", rdzv_configs=timeouts)
    if job.elastic:
        # A store shared by all rounds stays with process 0 of the first round, and nodes that were already there do not
        # learn that another node has replaced it. Use a separate store for each round.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    agent = agent_class(job, store, _missing_nodes(job), _status, _outcome)
    setattr(api, "LocalElasticAgent", agent)  # noqa: B010  # mypy rejects assignment to a class
    api.elastic_launch(config, sys.executable)("-u", *PROGRAM, *job.command)


def _missing_nodes(job: Job) -> str:
    return (
        f"not all {job.nodes[0]} nodes met at {job.endpoint} within {job.wait} s (-w); start the same command on each, "
        f"and check that they can reach port {job.port} of {job.host}"
    )


def _status(statuses: dict[int, int]) -> int:
    """The launcher's exit status, from those of failed processes. Reports those killed by a signal."""
    if EXIT_MISTAKE in statuses.values():
        return EXIT_MISTAKE
    if set(statuses.values()) <= {EXIT_STOPPED, -signal.SIGTERM} and EXIT_STOPPED in statuses.values():
        return EXIT_STOPPED
    for rank, status in statuses.items():
        if status < 0 and -status not in (signal.SIGTERM, signal.SIGPIPE):
            print(describe_kill(f"process {rank} on {socket.gethostname()}", -status), file=sys.stderr)
    return 128 + signal.SIGPIPE if -signal.SIGPIPE in statuses.values() else 1


def _status_after_stop() -> int:
    """The launcher's exit status after a stop request, from those of all processes of this node.

    A process that SIGTERM itself ended was still starting and had nothing to save.
    """
    if _outcome.final is not None:
        return _outcome.final
    statuses = _outcome.statuses
    failed = {rank: status for rank, status in statuses.items() if status not in (0, -signal.SIGTERM)}
    if statuses and all(status == 0 for status in statuses.values()):
        return 0  # they had finished
    return _status(failed) if failed else EXIT_STOPPED


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: that of the command; 2 for a user error; 1 if a process or node was lost."""
    try:
        return launch(read_job(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return EXIT_MISTAKE
    except JobFailed as error:
        print("error:", error, file=sys.stderr)
        return 1


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Be the launcher: run ``main`` and end the process with its status."""
    console.guard(outlive=True)
    listen()
    console.flush_and_exit(main(argv))  # the watchdog and torch's rendezvous have threads that use the store


if __name__ == "__main__":
    run()
