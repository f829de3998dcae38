"""A thread beside the training in every process, so that trouble in one ends all of them, soon and with its name.

Three kinds of trouble. A process that fails tells the others through the launcher's key-value store, and they leave at
once instead of waiting for it in a collective. A process that was asked to stop where nothing can be saved yet (while
data is prepared) tells them likewise. And where nothing moves for longer than the main thread said it might, the
processes compare how many collectives each has entered: who is behind, or does not answer, hangs.
"""

import faulthandler
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .console import flush, say
from .context import Context
from .patient_store import PatientStore
from .place import speaks

POLL_SECONDS = 0.25
ANSWER_SECONDS = 3.0
"""How long the others wait for a process to say where it stands before they call it stopped or gone."""
STORE_SECONDS = 5.0
"""How long the key-value store may take to answer before the watch goes on without it."""
ALIVE_SECONDS = 30.0
"""After so long without a sign of life a process that others wait for is gone."""

TIMEOUT, STEP_TIMEOUT = "parallel.timeout_seconds", "parallel.step_timeout_seconds"
"""The settings that say how long something may take: everything, and a step like those before it."""

NO_ANSWER = "does not answer: it was killed or is stopped, or its machine or the network to it is gone"

_current: "Watch | None" = None


def current() -> "Watch | None":
    """The watch of this process, if one is on."""
    return _current


class Watch:
    """Watches this process and hears of the others; on from ``start`` to ``stop``.

    Attributes:
        spoken: whether this process has said why it leaves.

    Args:
        context: this process's place; its process group is up.
        folder: where dumps go when a process hangs.
        on_stop: called in this thread when another process was asked to stop.
    """

    def __init__(self, context: Context, folder: Path, on_stop: Callable[[], None]) -> None:
        self.context, self.folder, self._on_stop = context, folder, on_stop
        self._activity, self._since, self._timeout = "starting", time.monotonic(), float("inf")
        self._setting = TIMEOUT
        self._off, self._leaving = threading.Event(), threading.Lock()
        self._told_stop, self.spoken = False, False
        self._store: PatientStore | None = None
        if context.world_size > 1:
            # A connection of its own: a thread that waits in another one holds it.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30), wait_for_workers=False)
            self._store = PatientStore(dist.PrefixStore(f"{context.attempt} watch", store), STORE_SECONDS)
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

    def heartbeat(self, activity: str, timeout_seconds: float, setting: str = TIMEOUT) -> None:
        """Report that the main thread is alive and starts an activity.

        Args:
            activity: for the message if it hangs.
            timeout_seconds: the longest that it may take.
            setting: the setting that says so.
        """
        self._activity, self._since, self._timeout, self._setting = (
            activity,
            time.monotonic(),
            timeout_seconds,
            setting,
        )

    def meet(self, name: str) -> None:
        """Wait for all processes, however long they take; no collective, which would time out.

        Raises:
            RuntimeError: a process no longer shows any sign of life.
        """
        if self._store is None:
            return
        # Process 0 looks after all others, and they after it: the store has few questions to answer.
        others = range(1, self.context.world_size) if self.context.is_main else [0]
        signs: dict[int, int | None] = dict.fromkeys(others, 0)
        seen = time.monotonic()
        met = self._add(f"met {name}", 1)
        while met is None or met < self.context.world_size:
            time.sleep(POLL_SECONDS)
            if time.monotonic() - seen > ALIVE_SECONDS:
                now = {rank: self._add(f"alive/{rank}", 0) for rank in others}
                gone = [rank for rank in others if now[rank] in (None, signs[rank])]
                if gone:
                    raise RuntimeError(f"process {_list(gone)} {NO_ANSWER}")
                signs, seen = now, time.monotonic()
            met = self._add(f"met {name}", 0)

    def tell_stop(self, name: str) -> None:
        """Tell the others that this process got a signal."""
        self._told_stop = True
        self._tell("stop", name)

    def tell_failure(self, status: int, line: str) -> None:
        """Tell the others that this process fails; the first one to do so is the one they name."""
        if self._store is not None:
            told = json.dumps([self.context.rank, status, line])
            with suppress(RuntimeError):
                self._store.ask(lambda store: store.compare_set("failure", "", told))
            self._set("news", "1")

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

    def part(self) -> None:
        """Before this process leaves by itself: where it keeps the store, the others need a moment to hear why."""
        if (
            self.context.world_size > 1
            and self.context.rank == 0
            and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        ):
            time.sleep(4 * POLL_SECONDS)

    def leave(self, status: int, line: str) -> None:
        """Say a line, unless it is empty, and end the process at once. The first to come here decides how."""
        self._leaving.acquire()
        if line:
            say(line)
        flush()
        os._exit(status)

    def _run(self) -> None:
        stop_heard = False
        for turn in itertools.count():
            before = time.monotonic()
            if self._off.wait(POLL_SECONDS):
                return
            now = time.monotonic()
            if now - before > 1 + POLL_SECONDS:
                self._since += now - before  # this process was stopped, or the machine slept: nobody's fault
            if turn % 8 == 0:
                self._add(f"alive/{self.context.rank}", 1)
            news = self._get("news") is not None
            failure = self.failure_of_another(0) if news else None
            if failure:
                time.sleep(1.0)  # the main thread, which a broken connection may have woken, may speak first
                self.leave(failure[1], "" if self.spoken else farewell(self.context.rank, failure))
            if news and not stop_heard and self._get("stop"):
                stop_heard = True
                self._on_stop()
            late = time.monotonic() - self._since > self._timeout
            setting = self._setting if late else self._get("hang") if news else None
            if setting and not self._off.is_set():
                self._hang(setting)

    def _hang(self, setting: str) -> None:
        """Everyone tells how many collectives it has entered and how long its main thread has been silent; process 0
        finds who is behind. ``setting`` is what allows for more time."""
        self._tell("hang", setting)
        rank, doing, seconds = self.context.rank, self._activity, time.monotonic() - self._since
        place = dump(self.folder / f"process-{rank}"), seconds, doing
        self._set(f"hang/{rank}", json.dumps(place))
        if rank == 0:
            verdict = self._find_who_hangs(place)
            self._set("verdict", json.dumps(verdict))
        else:
            told = self._wait_for("verdict", 2 * ANSWER_SECONDS)
            verdict = json.loads(told) if told else ([0], 0, "")
        silent, behind, where = verdict
        text = f"process {rank}: no progress for {seconds:.0f} s in {doing}"
        if silent:
            text += f"; process {_list(silent)} {NO_ANSWER}"
        elif behind == rank:
            text = f"process {rank} hangs in {doing}: no progress for {seconds:.0f} s"
        else:
            text += f"; process {behind} hangs in {where}"
        if rank == 0:
            time.sleep(1.0)  # the others must have heard, and who hangs speaks first
        advice = f"a longer {setting} if it was only slow"
        self.leave(1, f"{text} (stacks and collectives of each process: {self.folder}; {advice})")

    def _find_who_hangs(self, mine: tuple[int, float, str]) -> tuple[list[int], int, str]:
        """Processes that do not answer; the one that entered the fewest collectives, of several the one that has been
        silent longest, and what it does."""
        answers, until = {0: mine}, time.monotonic() + ANSWER_SECONDS
        for other in range(1, self.context.world_size):
            if told := self._wait_for(f"hang/{other}", max(until - time.monotonic(), 0)):
                answers[other] = tuple(json.loads(told))
        behind = min(answers, key=lambda each: (answers[each][0], -answers[each][1]))
        silent = [other for other in range(self.context.world_size) if other not in answers]
        return silent, behind, answers[behind][2]

    def _wait_for(self, key: str, seconds: float) -> str | None:
        until = time.monotonic() + seconds
        while (told := self._get(key)) is None and time.monotonic() < until:
            time.sleep(0.05)
        return told

    def _tell(self, key: str, value: str) -> None:
        """Set a key that everyone looks at: there is something to look at."""
        self._set(key, value)
        self._set("news", "1")

    def _set(self, key: str, value: str) -> None:
        if self._store is not None:
            with suppress(RuntimeError):  # the store goes with the process or agent that keeps it
                self._store.ask(lambda store: store.set(key, value))

    def _add(self, key: str, amount: int) -> int | None:
        """The count after the addition; None while the store does not answer, which may still do it."""
        if self._store is None:
            return None
        with suppress(RuntimeError):
            return int(self._store.ask(lambda store: store.add(key, amount)))
        return None

    def _get(self, key: str) -> str | None:
        if self._store is None:
            return None
        with suppress(RuntimeError):
            told = self._store.ask(lambda store: store.get(key) if store.check([key]) else None)
            return None if told is None else str(told.decode())
        return None


def farewell(rank: int, failure: tuple[int, int, str]) -> str:
    """What a process says that leaves because another one failed. The user's mistake is told once a node."""
    other, status, line = failure
    if status == 2:
        return f"error: {line}" if speaks() else ""
    return f"process {rank} leaves: process {other} failed ({line})"


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


def interrupt() -> None:
    """Ask this process to stop, as another one was. Not by the signal that came there, which may be ignored here."""
    os.kill(os.getpid(), signal.SIGTERM)
