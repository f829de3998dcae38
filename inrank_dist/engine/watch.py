"""A thread beside the training in every process, so that trouble in one ends all of them, soon and with its name.

Three kinds of trouble. A process that fails tells the others through the launcher's key-value store, and they leave at
once instead of waiting for it in a collective. A process that was asked to stop where nothing can be saved yet (while
data is prepared) tells them likewise. And where nothing moves for longer than the main thread said it might, the
processes compare how many collectives each has entered: who is behind, or does not answer, hangs.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .context import Context

POLL_SECONDS = 0.25
ANSWER_SECONDS = 3.0
"""How long the others wait for a process to say where it stands before they call it stopped or gone."""

_current: "Watch | None" = None


def current() -> "Watch | None":
    """The watch of this process, if one is on."""
    return _current


class Watch:
    """Watches this process and hears of the others; on from ``start`` to ``stop``.

    Args:
        context: this process's place; its process group is up.
        folder: where dumps go when a process hangs.
        on_stop: called in this thread when another process was asked to stop.
    """

    def __init__(self, context: Context, folder: Path, on_stop: Callable[[str], None]) -> None:
        self.context, self.folder, self._on_stop = context, folder, on_stop
        self._doing, self._since, self._patience = "starting", time.monotonic(), float("inf")
        self._off, self._leaving = threading.Event(), threading.Lock()
        self._told_stop = False
        self._store: dist.Store | None = None
        if context.world_size > 1:
            # A connection of its own: a thread that waits in another one holds it.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30), wait_for_workers=False)
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = dist.PrefixStore(f"inrank watch {attempt}", store)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin."""
        global _current
        _current = self
        self._thread.start()

    def stop(self) -> None:
        """End; before the process group goes."""
        global _current
        _current = None
        if self._told_stop and self._store is not None:
            time.sleep(4 * POLL_SECONDS)  # the store may end with this process; the others must have heard
        self._off.set()
        self._thread.join()

    def beat(self, doing: str, patience: float) -> None:
        """The main thread is alive and now does something that takes at most ``patience`` seconds."""
        self._doing, self._since, self._patience = doing, time.monotonic(), patience

    def meet(self, name: str) -> None:
        """Wait for all processes, however long they take; no collective, which would time out."""
        if self._store is None:
            return
        self._store.add(f"met {name}", 1)
        while int(self._store.add(f"met {name}", 0)) < self.context.world_size:
            time.sleep(POLL_SECONDS)

    def tell_stop(self, name: str) -> None:
        """Tell the others that this process got a signal."""
        self._told_stop = True
        self._set("stop", name)

    def tell_failure(self, status: int, line: str) -> None:
        """Tell the others that this process fails; the first one to do so is the one they name."""
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.compare_set("failure", "", json.dumps([self.context.rank, status, line]))

    def failure_of_another(self, wait_seconds: float) -> tuple[int, int, str] | None:
        """Process, exit status and line of the first failure, if it is another process's."""
        until = time.monotonic() + wait_seconds
        while True:
            told = self._get("failure")
            if told:
                rank, status, line = json.loads(told)
                return None if rank == self.context.rank else (rank, status, line)
            if time.monotonic() > until or self._store is None:
                return None
            time.sleep(0.05)

    def leave(self, status: int, line: str) -> None:
        """Say a line, unless it is empty, and end the process at once. The first to come here decides how."""
        self._leaving.acquire()
        if line:
            sys.stderr.write(line + "\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _run(self) -> None:
        stop_heard = False
        while not self._off.wait(POLL_SECONDS):
            failure = self.failure_of_another(0)
            if failure:
                time.sleep(1.0)  # the main thread, which a broken connection may have woken, may speak first
                self.leave(failure[1], farewell(self.context.rank, failure))
            if not stop_heard and (name := self._get("stop")):
                stop_heard = True
                self._on_stop(name)
            if time.monotonic() - self._since > self._patience and not self._off.is_set():
                self._hang()

    def _hang(self) -> None:
        doing, seconds = self._doing, time.monotonic() - self._since
        rank, count = self.context.rank, self.context.world_size
        entered = dump(self.folder / f"process-{rank}")
        self._set(f"hang/{rank}", str(entered))
        others = [other for other in range(count) if other != rank]
        until = time.monotonic() + ANSWER_SECONDS
        answers: dict[int, int] = {rank: entered}
        while len(answers) < count and time.monotonic() < until:
            time.sleep(0.05)
            answers |= {r: int(told) for r in others if r not in answers and (told := self._get(f"hang/{r}"))}
        silent = [other for other in others if other not in answers]
        least = min(answers.values())
        apart = not silent and least < max(answers.values())
        behind = [other for other, count_ in answers.items() if apart and count_ == least]
        text = f"process {rank}: no progress for {seconds:.0f} s in {doing}"
        if rank in behind or count == 1:
            text = f"process {rank} hangs in {doing}: no progress for {seconds:.0f} s"
        elif silent:
            text += f"; process {_list(silent)} does not answer: it is stopped, or its machine is gone"
        elif behind:
            text += f"; process {_list(behind)} hangs"
            time.sleep(0.5)  # it speaks first
        self.leave(1, f"{text} (stacks and collectives of each process: {self.folder})")

    def _set(self, key: str, value: str) -> None:
        if self._store is not None:
            with suppress(RuntimeError):  # the store goes with the process or agent that keeps it
                self._store.set(key, value)

    def _get(self, key: str) -> str | None:
        if self._store is None:
            return None
        with suppress(RuntimeError):
            if self._store.check([key]):
                return str(self._store.get(key).decode())
        return None


def farewell(rank: int, failure: tuple[int, int, str]) -> str:
    """What a process says that leaves because another one failed; nothing where that was the user's mistake, which is
    told once."""
    other, status, line = failure
    return "" if status == 2 else f"process {rank} leaves: process {other} failed ({line})"


def dump(path: Path) -> int:
    """Write this process's Python stacks (``.stacks``) and torch's flight recorder (``.json``): the collectives that it
    entered.

    Returns:
        How many collectives this process has entered, over all groups; 0 where torch cannot tell.
    """
    trace = _flight_recorder()
    entered = sum(int(each["last_enqueued_collective"]) for each in trace.get("pg_status", {}).values())
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(trace))
        with path.with_suffix(".stacks").open("w") as file:
            faulthandler.dump_traceback(file)
    return entered


def _flight_recorder() -> dict[str, Any]:
    from torch._C import _distributed_c10d as c10d  # has no public name; the tests notice when it moves

    dump_json = getattr(c10d, "_dump_fr_trace_json", None)
    if dump_json is None:
        return {}
    try:
        return dict(json.loads(dump_json(includeCollectives=True, onlyActive=False)))
    except (RuntimeError, ValueError, TypeError):
        return {}


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")


def interrupt(name: str) -> None:
    """Give this process's main thread the signal that another process got."""
    os.kill(os.getpid(), getattr(signal, name))
