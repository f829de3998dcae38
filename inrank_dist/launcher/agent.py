"""torch's elastic agent, with what it lacks: it ends when the network is cut, and does not repeat a mistake."""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
from torch.distributed.elastic.agent.server.api import WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

MISTAKE = 2
GONE_SECONDS = 30
"""How long the agent may take to notice that its processes have ended, and to leave."""
BARRIER_SECONDS = 330
"""The same where they have ended well: torch's agent then waits 300 s for the other nodes."""


def guarded(wait: int, lost: str, status: Callable[[dict[int, Any]], int]) -> type[LocalElasticAgent]:
    """A class of agents beside which a thread looks that they do not wait for ever.

    Between two looks at its processes the agent asks a key-value store on another node whether there is news. Where the
    network is cut no answer comes, torch sets no limit, and the agent does not see that its processes have ended.

    Args:
        wait: seconds that a rendezvous may take.
        lost: the line to say when the store is silent.
        status: exit status from the failures of processes.
    """

    class Agent(LocalElasticAgent):
        def _initialize_workers(self, worker_group: Any) -> None:
            self._guard("meeting", wait + 60, 1)
            super()._initialize_workers(worker_group)
            self._guard("running", GONE_SECONDS, 1)

        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            if result.state == WorkerState.SUCCEEDED:
                self._guard("done", BARRIER_SECONDS, 0)
            elif result.state == WorkerState.FAILED:
                if any(failure.exitcode == MISTAKE for failure in result.failures.values()):
                    self._remaining_restarts = 0
                if self._remaining_restarts == 0:
                    self._guard("failed", GONE_SECONDS, status(result.failures))
            else:
                self._guard("running", GONE_SECONDS, 1)
            return result

        def _guard(self, doing: str, limit: float, leave: int) -> None:
            first = not hasattr(self, "_state")
            self._state = doing, time.monotonic() + limit, leave
            if first:
                threading.Thread(target=self._watch, name="guard", daemon=True).start()

        def _watch(self) -> None:
            alive_until = time.monotonic()
            while True:
                time.sleep(1)
                now = time.monotonic()
                doing, deadline, leave = self._state
                if _children_live():
                    alive_until = now
                elif now > deadline and (doing == "meeting" or now - alive_until > GONE_SECONDS):
                    if doing in ("running", "meeting"):
                        sys.stderr.write(f"error: {lost}\n")
                    sys.stderr.flush()
                    os._exit(leave)

    return Agent


def _children_live() -> bool:
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                return True
    return False
