"""torch's elastic agent, extended to exit when the network is lost or when any node reports a user error."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
from torch.distributed.elastic.agent.server.api import WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException

from ..runtime import console
from ..runtime.errors import EXIT_MISTAKE, JobFailed
from ..runtime.store_client import StoreClient
from .common import Outcome
from .torchrun_job import Job

MISTAKE_KEY = "inrank mistake"
EXIT_TIMEOUT_SECONDS = 30
"""How long the agent may take to notice that its processes have exited, and to exit itself."""
BARRIER_TIMEOUT_SECONDS = 330
"""The same after success: torch's agent waits up to 300 s for the other nodes."""
MISTAKE_GRACE_SECONDS = 10
"""A mistake that is common to all nodes shows on each of them within this time."""


def agent_class(
    job: Job,
    store: StoreClient | None,
    missing: str,
    status: Callable[[dict[int, int]], int],
    outcome: Outcome,
) -> type[LocalElasticAgent]:
    """Return an agent class with a watchdog thread that keeps the agent from waiting forever.

    While its processes run, torch's agent polls a key-value store on another node. If the network is lost, that call
    never returns (torch sets no timeout), and the agent does not notice that its own processes have exited. Agents also
    do not report user errors to each other, so processes on other nodes would wait for peers that are gone.

    Args:
        job: the job whose processes the agent starts on this node.
        store: the job's store; None for a single node.
        missing: error message if other nodes do not join.
        status: maps the exit statuses of failed processes to the launcher's exit status.
        outcome: updated as processes end.
    """
    lost = f"lost the network to {job.endpoint}, where the nodes meet; start the same command again"

    class Agent(LocalElasticAgent):
        def run(self, role: str = "default") -> Any:
            result = super().run(role)
            if result is None:  # how torch reports a closed rendezvous
                raise JobFailed(f"the job that met at {job.endpoint} has ended; nothing is left to join")
            return result

        def _initialize_workers(self, worker_group: Any) -> None:
            self._set_deadline("rendezvous", job.wait + 120, 1)
            super()._initialize_workers(worker_group)
            self._set_deadline("running", EXIT_TIMEOUT_SECONDS, 1)

        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            if result.state == WorkerState.SUCCEEDED:
                outcome.final = 0
                self._set_deadline("done", BARRIER_TIMEOUT_SECONDS, 0)
            elif result.state == WorkerState.FAILED:
                mistake = any(failure.exitcode == EXIT_MISTAKE for failure in result.failures.values())
                if mistake:
                    self._remaining_restarts = 0
                if self._remaining_restarts == 0:
                    statuses = {rank: int(failure.exitcode) for rank, failure in result.failures.items()}
                    outcome.final = status(statuses)
                    self._set_deadline("failed", EXIT_TIMEOUT_SECONDS, outcome.final)
                if mistake and store:
                    _report_mistake(store, job.nodes[0])
            else:
                self._set_deadline("running", EXIT_TIMEOUT_SECONDS, 1)
            return result

        def _start_workers(self, worker_group: Any) -> Any:
            # By default torch also handles SIGHUP, even under nohup, and forwards signals that our processes ignore.
            os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM"
            return super()._start_workers(worker_group)

        def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: float | None = None) -> None:
            # Releases before torch 2.13 pass no timeout and ignore the variable, so processes are waited for here.
            stopping = isinstance(sys.exc_info()[1], SignalException)
            if stopping:  # a second signal would interrupt the wait and leave the processes behind
                signal.signal(signal.SIGTERM, lambda *_: None)
            if self._pcontext:
                self._pcontext.close(death_sig, int(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]))
            super()._shutdown(death_sig)
            for local_rank, handler in getattr(self._pcontext, "subprocess_handlers", {}).items() if stopping else ():
                code = handler.proc.poll()
                outcome.statuses[local_rank] = -signal.SIGKILL if code is None else code

        def _set_deadline(self, phase: str, seconds: float, exit_status: int) -> None:
            first = not hasattr(self, "_state")
            self._state = phase, time.monotonic() + seconds, exit_status
            if first:
                threading.Thread(target=self._watch, name="agent watchdog", daemon=True).start()

        def _watch(self) -> None:
            alive_until, mistake_at = time.monotonic(), None
            while True:
                time.sleep(1)
                now = time.monotonic()
                phase, deadline, exit_status = self._state
                host = _host_with_mistake(store)
                mistake_at = mistake_at or (now if host else None)
                if mistake_at and now - mistake_at > MISTAKE_GRACE_SECONDS and phase != "failed":
                    _kill_children()
                    _exit(EXIT_MISTAKE, f"a process on {host} exited with a user error; see its output there")
                if _live_children():
                    alive_until = now
                elif now > deadline and (phase == "rendezvous" or now - alive_until > EXIT_TIMEOUT_SECONDS):
                    _exit(exit_status, {"rendezvous": missing, "running": lost}.get(phase, ""))

    return Agent


def _report_mistake(store: StoreClient, nodes: int) -> None:
    """Report a user error to the other nodes and wait until they have seen it: the store may end with this process."""
    deadline = time.monotonic() + MISTAKE_GRACE_SECONDS + 3
    with suppress(RuntimeError):
        store.call(lambda s: s.set(MISTAKE_KEY, socket.gethostname()))
        reports = store.call(lambda s: s.add(f"{MISTAKE_KEY} count", 1))
        while reports < nodes and time.monotonic() < deadline:
            time.sleep(0.2)
            reports = store.call(lambda s: s.add(f"{MISTAKE_KEY} count", 0))


def _host_with_mistake(store: StoreClient | None) -> str | None:
    """Host on which a process exited with a user error, if any."""
    if store:
        with suppress(RuntimeError):
            host = store.call(lambda s: s.get(MISTAKE_KEY) if s.check([MISTAKE_KEY]) else None)
            return None if host is None else str(host.decode())
    return None


def _live_children() -> list[psutil.Process]:
    live = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                live.append(child)
    return live


def _kill_children() -> None:
    """Kill processes that wait for peers that are gone. Those that could save have exited by themselves."""
    for child in _live_children():
        with suppress(psutil.NoSuchProcess):
            child.kill()


def _exit(status: int, line: str) -> None:
    if line:
        console.write_stderr(f"error: {line}")
    console.flush_and_exit(status)
