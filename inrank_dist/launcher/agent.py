"""torch's elastic agent, with what it lacks: it ends when the network is cut, and when the user's mistake has ended
processes, on whatever node."""

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
from ..runtime.errors import EXIT_MISTAKE, Lost
from ..runtime.patient_store import PatientStore
from .common import Outcome
from .torchrun_job import Job

MISTAKE_KEY = "inrank mistake"
GONE_SECONDS = 30
"""How long the agent may take to notice that its processes have ended, and to leave."""
BARRIER_SECONDS = 330
"""The same where they have ended well: torch's agent then waits 300 s for the other nodes."""
SAME_SECONDS = 10
"""In this time the processes of all nodes have told the same mistake, if all have made it."""


def guarded(
    job: Job,
    store: PatientStore | None,
    missing: str,
    status: Callable[[dict[int, int]], int],
    outcome: Outcome,
) -> type[LocalElasticAgent]:
    """A class of agents beside which a thread looks that they do not wait for ever.

    Between two looks at its processes the agent asks a key-value store on another node whether there is news. Where the
    network is cut no answer comes, torch sets no limit, and the agent does not see that its processes have ended. And
    agents do not tell each other of mistakes: the others' processes would wait for those that are gone.

    Args:
        job: of which the agent starts this node's processes.
        store: of the job; None: there is but this node.
        missing: the line to say when other nodes do not come.
        status: exit status from those of processes.
        outcome: written as it comes.
    """
    lost = f"lost the network to {job.place}, where the nodes meet; start the same command again"

    class Agent(LocalElasticAgent):
        def run(self, role: str = "default") -> Any:
            result = super().run(role)
            if result is None:  # torch's way to say so
                raise Lost(f"the job that met at {job.place} has ended; nothing is left to join")
            return result

        def _initialize_workers(self, worker_group: Any) -> None:
            self._guard("meeting", job.wait + 120, 1)
            super()._initialize_workers(worker_group)
            self._guard("running", GONE_SECONDS, 1)

        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            if result.state == WorkerState.SUCCEEDED:
                outcome.final = 0
                self._guard("done", BARRIER_SECONDS, 0)
            elif result.state == WorkerState.FAILED:
                mistake = any(failure.exitcode == EXIT_MISTAKE for failure in result.failures.values())
                if mistake:
                    self._remaining_restarts = 0
                if self._remaining_restarts == 0:
                    statuses = {rank: int(failure.exitcode) for rank, failure in result.failures.items()}
                    outcome.final = status(statuses)
                    self._guard("failed", GONE_SECONDS, outcome.final)
                if mistake and store:
                    _tell_mistake(store, job.nodes[0])
            else:
                self._guard("running", GONE_SECONDS, 1)
            return result

        def _start_workers(self, worker_group: Any) -> Any:
            # Else torch takes more signals, SIGHUP also below nohup, and ends processes by signals they do not know.
            os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM"
            return super()._start_workers(worker_group)

        def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
            asked = isinstance(sys.exc_info()[1], SignalException)
            if asked:  # a second signal would end the waiting and leave the processes behind
                signal.signal(signal.SIGTERM, lambda *_: None)
            super()._shutdown(death_sig, timeout)
            for local_rank, handler in getattr(self._pcontext, "subprocess_handlers", {}).items() if asked else ():
                code = handler.proc.poll()
                outcome.statuses[local_rank] = -signal.SIGKILL if code is None else code

        def _guard(self, doing: str, limit: float, leave: int) -> None:
            first = not hasattr(self, "_state")
            self._state = doing, time.monotonic() + limit, leave
            if first:
                threading.Thread(target=self._watch, name="guard", daemon=True).start()

        def _watch(self) -> None:
            alive_until, told_at = time.monotonic(), None
            while True:
                time.sleep(1)
                now = time.monotonic()
                doing, deadline, leave = self._state
                wrong = _mistaken(store)
                told_at = told_at or (now if wrong else None)
                if told_at and now - told_at > SAME_SECONDS and doing != "failed":
                    _end_children()
                    _leave(EXIT_MISTAKE, f"a process on {wrong} has ended with a mistake, which it tells there")
                if _live_children():
                    alive_until = now
                elif now > deadline and (doing == "meeting" or now - alive_until > GONE_SECONDS):
                    _leave(leave, {"meeting": missing, "running": lost}.get(doing, ""))

    return Agent


def _tell_mistake(store: PatientStore, nodes: int) -> None:
    """Tell the other nodes, and stay until they have ended or made the same: the store may end with this process."""
    until = time.monotonic() + SAME_SECONDS + 3
    with suppress(RuntimeError):
        store.ask(lambda held: held.set(MISTAKE_KEY, socket.gethostname()))
        told = store.ask(lambda held: held.add(f"{MISTAKE_KEY} told", 1))
        while told < nodes and time.monotonic() < until:
            time.sleep(0.2)
            told = store.ask(lambda held: held.add(f"{MISTAKE_KEY} told", 0))


def _mistaken(store: PatientStore | None) -> str | None:
    """The node on which the user's mistake has ended a process."""
    if store:
        with suppress(RuntimeError):
            told = store.ask(lambda held: held.get(MISTAKE_KEY) if held.check([MISTAKE_KEY]) else None)
            return None if told is None else str(told.decode())
    return None


def _live_children() -> list[psutil.Process]:
    live = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                live.append(child)
    return live


def _end_children() -> None:
    """They wait for processes that are gone; those that could save have left by themselves."""
    for child in _live_children():
        with suppress(psutil.NoSuchProcess):
            child.kill()


def _leave(status: int, line: str) -> None:
    if line:
        console.say(f"error: {line}")
    console.leave(status)
