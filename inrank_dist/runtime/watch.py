"""A watchdog thread in every process: a failure of one process ends all of them soon, with a message that names it.

It handles three cases. A process that fails reports it through the launcher's key-value store, and the others exit at
once instead of waiting in a collective. A process that is asked to stop while nothing can be saved yet (during data
preparation) reports that in the same way. If the main thread makes no progress within the timeout it has set, the
processes compare how many collectives each has entered: the one that is behind, or does not answer, hangs.
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

from .console import flush, write_stderr
from .context import Context
from .environment import logs_for_node
from .store_client import StoreClient

POLL_SECONDS = 0.25
ANSWER_SECONDS = 3.0
"""How long to wait for another process's state before it counts as stopped or gone."""
STORE_SECONDS = 5.0
"""Timeout of a call to the key-value store."""
ALIVE_SECONDS = 30.0
"""A process without a heartbeat for this long counts as gone."""

TIMEOUT, STEP_TIMEOUT = "parallel.timeout_seconds", "parallel.step_timeout_seconds"
"""The settings of the timeouts: for any activity, and for a step compared with earlier steps."""

NO_ANSWER = "does not answer: it was killed or is stopped, or its machine or the network to it is gone"

_current: "Watch | None" = None


def current() -> "Watch | None":
    """The active watch of this process, if any."""
    return _current


class Watch:
    """Watches this process and listens to the others, from ``start`` to ``stop``.

    Attributes:
        reported: whether this process has already logged why it exits.

    Args:
        context: with its process group initialized.
        folder: for the dumps after a hang.
        on_stop: called in the watchdog thread when another process was asked to stop.
    """

    def __init__(self, context: Context, folder: Path, on_stop: Callable[[], None]) -> None:
        self.context, self.folder, self._on_stop = context, folder, on_stop
        self._activity, self._since, self._timeout = "starting", time.monotonic(), float("inf")
        self._setting = TIMEOUT
        self._off, self._exiting = threading.Event(), threading.Lock()
        self._reported_stop, self.reported = False, False
        self._store: StoreClient | None = None
        if context.world_size > 1:
            # A separate connection, because a thread that waits on a connection blocks all others.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30), wait_for_workers=False)
            self._store = StoreClient(dist.PrefixStore(f"{context.attempt} watch", store), STORE_SECONDS)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Start the watchdog thread."""
        global _current
        _current = self
        self._thread.start()

    def stop(self) -> None:
        """Stop the watchdog thread. Call this before the process group is destroyed."""
        global _current
        _current = None
        if self._reported_stop and self._store is not None:
            time.sleep(4 * POLL_SECONDS)  # the store may end with this process, so let the others read it first
        self._off.set()
        self._thread.join()

    def heartbeat(self, activity: str, timeout_seconds: float, setting: str = TIMEOUT) -> None:
        """Report that the main thread makes progress and starts an activity.

        Args:
            activity: for the error message if it hangs.
            timeout_seconds: the longest the activity may take.
            setting: name of the setting that sets this timeout.
        """
        self._activity, self._since, self._timeout, self._setting = (
            activity,
            time.monotonic(),
            timeout_seconds,
            setting,
        )

    def barrier(self, name: str) -> None:
        """Wait for all processes without a time limit. A collective would time out.

        Raises:
            RuntimeError: a process has stopped sending heartbeats.
        """
        if self._store is None:
            return
        # Process 0 checks all others and they check process 0, which keeps the number of store calls small.
        others = range(1, self.context.world_size) if self.context.is_main else [0]
        heartbeats: dict[int, int | None] = dict.fromkeys(others, 0)
        checked_at = time.monotonic()
        arrived = self._add(f"barrier {name}", 1)
        while arrived is None or arrived < self.context.world_size:
            time.sleep(POLL_SECONDS)
            if time.monotonic() - checked_at > ALIVE_SECONDS:
                now = {rank: self._add(f"alive/{rank}", 0) for rank in others}
                gone = [rank for rank in others if now[rank] in (None, heartbeats[rank])]
                if gone:
                    raise RuntimeError(f"process {_list(gone)} {NO_ANSWER}")
                heartbeats, checked_at = now, time.monotonic()
            arrived = self._add(f"barrier {name}", 0)

    def report_stop(self, name: str) -> None:
        """Report to the others that this process received a signal."""
        self._reported_stop = True
        self._publish("stop", name)

    def report_failure(self, status: int, line: str) -> None:
        """Report to the others that this process fails. They exit with the first failure that was reported."""
        if self._store is not None:
            failure = json.dumps([self.context.rank, status, line])
            with suppress(RuntimeError):
                self._store.call(lambda store: store.compare_set("failure", "", failure))
            self._set("news", "1")

    def failure_of_another(self, wait_seconds: float) -> tuple[int, int, str] | None:
        """Process rank, exit status and message of the first failure, if another process reported it."""
        deadline = time.monotonic() + wait_seconds
        while True:
            failure = self._get("failure")
            if failure:
                rank, status, line = json.loads(failure)
                return None if rank == self.context.rank else (rank, status, line)
            if time.monotonic() > deadline or self._store is None:
                return None
            time.sleep(0.05)

    def linger(self) -> None:
        """Call before this process exits. If it runs the store, give the others time to read the failure."""
        if (
            self.context.world_size > 1
            and self.context.rank == 0
            and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        ):
            time.sleep(4 * POLL_SECONDS)

    def exit(self, status: int, line: str) -> None:
        """Write a line, unless it is empty, and end the process at once. If threads race, the first caller wins."""
        self._exiting.acquire()
        if line:
            write_stderr(line)
        flush()
        os._exit(status)

    def _run(self) -> None:
        stop_seen = False
        for turn in itertools.count():
            before = time.monotonic()
            if self._off.wait(POLL_SECONDS):
                return
            now = time.monotonic()
            if now - before > 1 + POLL_SECONDS:
                self._since += now - before  # this process or the machine was suspended: not a hang
            if turn % 8 == 0:
                self._add(f"alive/{self.context.rank}", 1)
            news = self._get("news") is not None
            failure = self.failure_of_another(0) if news else None
            if failure:
                time.sleep(1.0)  # the main thread may have failed on a broken connection; let it report first
                self.exit(failure[1], "" if self.reported else exit_message(self.context.rank, failure))
            if news and not stop_seen and self._get("stop"):
                stop_seen = True
                self._on_stop()
            late = time.monotonic() - self._since > self._timeout
            setting = self._setting if late else self._get("hang") if news else None
            if setting and not self._off.is_set():
                self._diagnose_hang(setting)

    def _diagnose_hang(self, setting: str) -> None:
        """Find the process that hangs, and exit.

        Every process publishes how many collectives it has entered and for how long its main thread has made no
        progress. Process 0 finds the one that is behind. ``setting`` is the setting of the timeout that expired.
        """
        self._publish("hang", setting)
        rank, activity, seconds = self.context.rank, self._activity, time.monotonic() - self._since
        state = dump(self.folder / f"process-{rank}"), seconds, activity
        self._set(f"hang/{rank}", json.dumps(state))
        if rank == 0:
            verdict = self._find_hung_process(state)
            self._set("verdict", json.dumps(verdict))
        else:
            text = self._wait_for("verdict", 2 * ANSWER_SECONDS)
            verdict = json.loads(text) if text else ([0], 0, "")
        silent, behind, where = verdict
        line = f"process {rank}: no progress for {seconds:.0f} s in {activity}"
        if silent:
            line += f"; process {_list(silent)} {NO_ANSWER}"
        elif behind == rank:
            line = f"process {rank} hangs in {activity}: no progress for {seconds:.0f} s"
        else:
            line += f"; process {behind} hangs in {where}"
        if rank == 0:
            time.sleep(1.0)  # let the others read the verdict, and the hung process report first
        advice = f"a longer {setting} if it was only slow"
        self.exit(1, f"{line} (stacks and collectives of each process: {self.folder}; {advice})")

    def _find_hung_process(self, local: tuple[int, float, str]) -> tuple[list[int], int, str]:
        """Returns the processes that do not answer, the process that has entered the fewest collectives (on a tie, the
        one without progress for longest), and that process's activity."""
        states, deadline = {0: local}, time.monotonic() + ANSWER_SECONDS
        for other in range(1, self.context.world_size):
            if text := self._wait_for(f"hang/{other}", max(deadline - time.monotonic(), 0)):
                states[other] = tuple(json.loads(text))
        behind = min(states, key=lambda each: (states[each][0], -states[each][1]))
        silent = [other for other in range(self.context.world_size) if other not in states]
        return silent, behind, states[behind][2]

    def _wait_for(self, key: str, seconds: float) -> str | None:
        deadline = time.monotonic() + seconds
        while (value := self._get(key)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return value

    def _publish(self, key: str, value: str) -> None:
        """Set a key, and the flag that makes the other processes look for new keys."""
        self._set(key, value)
        self._set("news", "1")

    def _set(self, key: str, value: str) -> None:
        if self._store is not None:
            with suppress(RuntimeError):  # the store ends with the process or agent that runs it
                self._store.call(lambda store: store.set(key, value))

    def _add(self, key: str, amount: int) -> int | None:
        """The count after the addition; None if the store does not answer in time (it may still count)."""
        if self._store is None:
            return None
        with suppress(RuntimeError):
            return int(self._store.call(lambda store: store.add(key, amount)))
        return None

    def _get(self, key: str) -> str | None:
        if self._store is None:
            return None
        with suppress(RuntimeError):
            value = self._store.call(lambda store: store.get(key) if store.check([key]) else None)
            return None if value is None else str(value.decode())
        return None


def exit_message(rank: int, failure: tuple[int, int, str]) -> str:
    """Message of a process that exits because another one failed. A user error is logged once per node."""
    other, status, line = failure
    if status == 2:
        return f"error: {line}" if logs_for_node() else ""
    return f"process {rank} leaves: process {other} failed ({line})"


def dump(path: Path) -> int:
    """Write this process's Python stacks (``.stacks``) and torch's flight recorder with its collectives (``.json``).

    Returns:
        Number of collectives this process has entered, over all groups; 0 if torch does not record them.
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
    from torch._C import _distributed_c10d as c10d  # no public name; tests fail if it moves

    dump_json = getattr(c10d, "_dump_fr_trace_json", None)
    if dump_json is None:
        return {}
    try:
        return dict(json.loads(dump_json(includeCollectives=True, onlyActive=False)))
    except (RuntimeError, ValueError, TypeError):
        return {}


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")


def request_stop() -> None:
    """Ask this process to stop, because another one was. Sends SIGTERM: the original signal may be ignored here."""
    os.kill(os.getpid(), signal.SIGTERM)
