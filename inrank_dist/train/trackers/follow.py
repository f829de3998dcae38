"""The process of one tracker: it follows ``metrics.jsonl`` and writes what is new.

``python -m inrank_dist.train.trackers.follow NAME MODULE:CLASS RUN_FOLDER new|resumed``, until its standard input ends.
It then writes the rest and closes the run.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...runtime import yaml_text
from ...runtime.signals import STOP_SIGNALS
from ..monitors.scalars import Curves
from .tracker import Description, State, Tracker, state_path

POLL_SECONDS = 1.0
LINGER_SECONDS = 90
"""How long this process lives after its standard input has ended, or the tracker has failed, whatever the tracker does.
For a training that was killed: one that ends waits for less."""


def main(arguments: list[str]) -> int:
    """Follow a run. Return 1 if the tracker failed, which its state then says why."""
    # The training decides when a stop is due, and ends this process through its standard input.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    name, place, folder, start = arguments
    module, _, attribute = place.partition(":")
    path, ended = state_path(Path(folder), name), threading.Event()
    threading.Thread(target=_wait_for_end, args=(ended,), daemon=True).start()
    _wait_for_predecessor()
    if start == "new":
        path.unlink(missing_ok=True)
    try:
        follow(getattr(importlib.import_module(module), attribute), Path(folder), path, ended)
        return 0
    except BaseException as error:
        signal.alarm(LINGER_SECONDS)
        traceback.print_exc()
        state = State.load(path)
        state.error = " ".join(str(error).split()) or type(error).__name__
        state.save(path)
        return 1


def follow(kind: type[Tracker], folder: Path, path: Path, ended: threading.Event) -> None:
    """Open the run in the tracker, write its records to it until ``ended``, and close it.

    Records up to the last step that was written before are left out, so that a step has one value in the tracker also
    after a resume. A tracker that was not there before receives all of them.
    """
    state = State.load(path)
    config = yaml_text.read(folder / "config.yaml")
    run = Description(path.parent, config["run"]["name"], config["log"]["project"], config)
    tracker = kind(run, state.id)
    state = State(tracker.id, state.sent if tracker.id == state.id else {})
    state.save(path)
    sent, curves, finished = dict(state.sent), Curves(), False
    for records in _appended(folder / "metrics.jsonl", ended):
        try:
            for record in records:
                kind_of_record, entries = str(record.get("kind")), curves.entries(record)
                finished = kind_of_record == "summary"
                if (entries.scalars or entries.texts) and entries.step > sent.get(kind_of_record, -1):
                    tracker.log(entries.step, entries.scalars, entries.texts)
                    state.sent[kind_of_record] = entries.step
        finally:
            if records:
                state.save(path)  # also if the tracker fails, so that a resumed run does not repeat what was sent
    tracker.close(finished)


def _appended(path: Path, ended: threading.Event) -> Iterator[list[dict[str, Any]]]:
    """Yield the records of a file, then what is appended to it, until ``ended``."""
    rest, last = b"", False
    with path.open("rb") as file:
        while not last:
            last = ended.wait(POLL_SECONDS)
            *lines, rest = (rest + file.read()).split(b"\n")
            yield [json.loads(line) for line in lines]


def _wait_for_end(ended: threading.Event) -> None:
    """Set ``ended`` at the end of standard input."""
    while os.read(0, 1):  # not sys.stdin, whose lock would be held at exit
        pass
    signal.alarm(LINGER_SECONDS)
    ended.set()


def _wait_for_predecessor() -> None:
    """Wait until the process of a job that was killed has let go of the tracker's log, which is our standard output."""
    deadline = time.monotonic() + LINGER_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(sys.stdout.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))  # Aim writes its last values at exit
