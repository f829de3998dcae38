"""torchrun for the commands of inrank: finds the network, speaks in single lines, and ends as the training did.

``python -m inrank_dist.launcher.torchrun [OPTIONS] COMMAND [WORDS ...]``; ``launch/torchrun.sh`` calls it. The
processes are those of torch's own elastic agent (``torch.distributed.launcher``).
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil

from ..runtime import console
from ..runtime.console import say
from ..runtime.errors import EXIT_MISTAKE, Lost, UserError
from ..runtime.signals import EXIT_STOPPED, STOP_SIGNALS, stop_signals
from .common import SHUTDOWN_SECONDS, Outcome, killed
from .network import LOOPBACK, address_towards, resolve, settings_for, shown
from .torchrun_job import Job, check_every_size, read_job

PROGRAM = ("-m", "inrank_dist")

_outcome = Outcome()


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
    address = resolve(job.host or LOOPBACK)
    settings = settings_for(address, job.processes)
    print(shown(settings), flush=True)
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
        return _status_when_asked()
    except ChildFailedError as error:
        return _status({rank: int(failure.exitcode) for rank, failure in error.failures.items()})
    except RendezvousClosedError:
        raise Lost(f"the job that met at {job.place} has ended; nothing is left to join") from None
    except (RendezvousError, dist.DistNetworkError, dist.DistStoreError):
        raise Lost(_missing(job)) from None


def listen() -> None:
    """Answer requests to stop. While no process of the training is there, leave at once with 75: there is nothing to
    save. Else a request becomes SIGTERM, which torch's agent passes on.

    A thread hears them, since the main thread may wait in C for other nodes, where Python's own handlers do not run.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    for number in stop_signals():
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def hear() -> None:
        with theirs:
            while heard := ours.recv(1):
                if heard[0] not in STOP_SIGNALS:
                    continue
                if not psutil.Process().children():
                    if _outcome.final is not None:
                        os._exit(_outcome.final)
                    say("stopped while no training was running; the same command starts it or goes on")
                    os._exit(EXIT_STOPPED)
                if heard[0] != signal.SIGTERM:
                    os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=hear, name="signals", daemon=True).start()


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


def _run(job: Job, address: str) -> None:
    from torch.distributed.launcher import api

    from .agent import guarded
    from .meeting import meet, meet_alone

    common: dict[str, Any] = {
        "min_nodes": job.nodes[0],
        "max_nodes": job.nodes[1],
        "nproc_per_node": job.processes,
        "max_restarts": job.restarts,
        "run_id": job.name,
    }
    store = None
    if job.host is None:
        alone = meet_alone()  # which lives as long as this function, or torch would make its own
        common |= {"rdzv_endpoint": f"{LOOPBACK}:{alone.port}", "local_addr": LOOPBACK}
        config = api.LaunchConfig(**common, rdzv_backend="static", rdzv_configs={"rank": 0, "timeout": job.wait})
    else:
        store = meet(job, address)
        bracketed = f"[{address}]" if ":" in address else address
        common |= {"rdzv_endpoint": f"{bracketed}:{job.port}", "local_addr": address_towards(address)}
        if job.node_rank is not None:
            numbered = {"rank": job.node_rank, "timeout": job.wait}
            config = api.LaunchConfig(**common, rdzv_backend="static", rdzv_configs=numbered)
        else:
            last_call = min(job.wait, 30)  # for nodes beyond the fewest
            times = {
                "is_host": False,  # meet has made the store
                "last_call_timeout": last_call,
                # In 15 s without a sign of life a node is taken for lost.
                "join_timeout": job.wait + (30 + last_call if job.elastic else 0),
            }
            config = api.LaunchConfig(**common, rdzv_backend="c10d", rdzv_configs=times)
    if job.elastic:
        # One store for all rounds stays with the first round's process 0, and nodes that were there do not hear that
        # another one has taken its place: each round gets a store of its own.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    agent = guarded(job, store, _missing(job), _status, _outcome)
    setattr(api, "LocalElasticAgent", agent)  # noqa: B010  # mypy takes no assignment to a class
    api.elastic_launch(config, sys.executable)("-u", *PROGRAM, *job.words)


def _missing(job: Job) -> str:
    return (
        f"not all {job.nodes[0]} nodes met at {job.place} within {job.wait} s (-w); start the same command on each, "
        f"and see that they reach port {job.port} of {job.host}"
    )


def _status(statuses: dict[int, int]) -> int:
    """Exit status from those of the processes that failed; a line on those that could not say one."""
    if EXIT_MISTAKE in statuses.values():
        return EXIT_MISTAKE
    if set(statuses.values()) <= {EXIT_STOPPED, -signal.SIGTERM} and EXIT_STOPPED in statuses.values():
        return EXIT_STOPPED
    for rank, status in statuses.items():
        if status < 0 and -status not in (signal.SIGTERM, signal.SIGPIPE):
            print(killed(f"process {rank} on {socket.gethostname()}", -status), file=sys.stderr)
    return 128 + signal.SIGPIPE if -signal.SIGPIPE in statuses.values() else 1


def _status_when_asked() -> int:
    """The same for all processes of this node, when they have been asked to stop. One that SIGTERM itself has ended was
    only just starting, and has lost nothing."""
    if _outcome.final is not None:
        return _outcome.final
    statuses = _outcome.statuses
    failed = {rank: status for rank, status in statuses.items() if status not in (0, -signal.SIGTERM)}
    if statuses and all(status == 0 for status in statuses.values()):
        return 0  # they were done
    return _status(failed) if failed else EXIT_STOPPED


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: that of the training; 2 the user's mistake; 1 a process or node was lost."""
    try:
        return launch(read_job(sys.argv[1:] if words is None else words))
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return EXIT_MISTAKE
    except Lost as error:
        print("error:", error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    console.guard(outlive=True)
    listen()
    console.leave(main())  # the guard and torch's rendezvous have threads that ask the store
