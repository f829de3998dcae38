"""The processes of the trackers of a run, as a monitor."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...runtime.errors import UserError
from ...runtime.progress import counted
from . import TRACKERS
from .tracker import State, state_path

log = logging.getLogger("inrank_dist")

OPEN_SECONDS = 30.0
"""How long a new run waits for its trackers to open."""
FINISH_SECONDS, STOP_SECONDS = 60.0, 15.0
"""How long a run that is complete, and one that stops before, waits for its trackers, all together. A run that stops
has little time, and its trackers receive the rest when it is resumed."""


class RunTrackers:
    """Starts a process for each tracker, which follows ``metrics.jsonl`` of the run folder.

    A tracker that fails once the run has begun is given up with a warning. Where a run is resumed, also one that cannot
    be opened: a job must not end because a server is away. What a tracker has missed it receives at the next start.

    Args:
        names: names of the trackers.
        folder: the run folder, with its ``config.yaml`` and ``metrics.jsonl``.
        resumes: whether the run goes on from a checkpoint in this folder. The run in the tracker then goes on too.

    Raises:
        UserError: a tracker of a new run cannot be opened.
        OSError: a file cannot be written.
    """

    def __init__(self, names: Sequence[str], folder: Path, *, resumes: bool) -> None:
        self._folder, self._finished = folder, False
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for name in names:
                self._running[name] = self._start(name, resumes)
            if not resumes:
                self._wait_until_open()
        except BaseException:
            self.close()
            raise

    def write(self, record: dict[str, Any]) -> None:
        """Warn of a tracker whose process has ended. The processes read the records themselves."""
        self._finished = record.get("kind") == "summary"
        for name, process in list(self._running.items()):
            if process.poll() is not None:
                _end(self._running.pop(name))
                log.warning(
                    "warning: %s is written to no more (%s); the run goes on, and metrics.jsonl has all of it",
                    name,
                    self._reason(name, process),
                )

    def close(self) -> None:
        """Let the trackers write the rest, for a limited time. May be called twice."""
        running, self._running = self._running, {}
        for process in running.values():
            assert process.stdin is not None
            process.stdin.close()
        seconds = FINISH_SECONDS if self._finished else STOP_SECONDS
        deadline = time.monotonic() + seconds
        for name, process in counted(running.items(), "waiting for the trackers"):
            try:
                if process.wait(max(deadline - time.monotonic(), 0)):
                    reason = self._reason(name, process)
                    log.warning("warning: the end of the run was not written to %s (%s)", name, reason)
            except subprocess.TimeoutExpired:
                log.warning("warning: %s was not done within %g s and was stopped", name, seconds)
            _end(process)

    def _start(self, name: str, resumes: bool) -> subprocess.Popen[bytes]:
        kind, path = TRACKERS[name], state_path(self._folder, name)
        path.parent.mkdir(exist_ok=True)
        if not resumes:  # which shows when it is open
            path.unlink(missing_ok=True)
        # Everything that this process can import the other one can; a folder of the tracker's name in the working
        # directory must not be taken for its package.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment = {**kind.environment, **os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
        place = f"{kind.__module__}:{kind.__qualname__}"
        words = [name, place, str(self._folder.absolute()), "resumed" if resumes else "new"]
        with path.with_suffix(".log").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.follow", *words],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def _wait_until_open(self) -> None:
        deadline = time.monotonic() + OPEN_SECONDS
        waiting = list(self._running)
        while waiting and time.monotonic() < deadline:
            for name in list(waiting):
                process, path = self._running[name], state_path(self._folder, name)
                if process.poll() is not None:
                    _end(self._running.pop(name))
                    raise UserError(
                        f"log.trackers has {name}, which cannot be opened ({self._reason(name, process)}); see "
                        f"{path.with_suffix('.log')}, or write log.trackers without it"
                    )
                if State.load(path).id is not None:
                    waiting.remove(name)
            time.sleep(0.05)

    def _reason(self, name: str, process: subprocess.Popen[bytes]) -> str:
        path = state_path(self._folder, name)
        return State.load(path).error or f"exit status {process.returncode}; see {path.with_suffix('.log')}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a tracker's process and its helpers, such as the service of Weights & Biases."""
    assert process.stdin is not None
    process.stdin.close()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
