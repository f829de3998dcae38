"""The launcher that started this process: when it is gone, its processes must not stay behind."""

import os
import signal
import threading
import time
from contextlib import suppress

import psutil

LAUNCHER = "INRANK_LAUNCHER"
"""Environment variable: process ID of a launcher on this machine that is not the parent of the processes it starts."""
LAUNCH = "INRANK_LAUNCH"
"""Environment variable of processes that our deepspeed launcher starts: name of the launch, own process ID."""
STARTED_BY = ("TORCHELASTIC_RUN_ID", LAUNCH)
"""Environment variables of launchers that stay as long as their processes do. Not so a shell in which somebody has set
``RANK`` and the others by hand."""
POLL_SECONDS = 0.5


def watch_launcher() -> None:
    """From now on, the end of the launcher that started this process is SIGTERM to it.

    A thread looks. The kernel's own way (``PR_SET_PDEATHSIG``) sends its signal already when the *thread* ends that
    started this process.
    """
    if any(name in os.environ for name in STARTED_BY):
        threading.Thread(target=_watch, args=(os.getppid(), _named_launcher()), name="launcher", daemon=True).start()


def _watch(parent: int, launcher: psutil.Process | None) -> None:
    while os.getppid() == parent and (launcher is None or _lives(launcher)):
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _named_launcher() -> psutil.Process | None:
    with suppress(KeyError, ValueError, psutil.NoSuchProcess):
        return psutil.Process(int(os.environ[LAUNCHER]))
    return None


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
