"""Watches the launcher of this process, so that no process survives its launcher."""

import os
import signal
import threading
import time
from contextlib import suppress

import psutil

LAUNCHER = "INRANK_LAUNCHER"
"""Environment variable: PID of a launcher on this machine that is not the parent of the training processes."""
LAUNCH = "INRANK_LAUNCH"
"""Environment variable of processes started by our DeepSpeed launcher: name of the launch and the process's own PID."""
STARTED_BY = ("TORCHELASTIC_RUN_ID", LAUNCH)
"""Environment variables of launchers that run as long as their processes do. A shell in which ``RANK`` and the others
were set by hand does not qualify."""
POLL_SECONDS = 0.5


def watch_launcher() -> None:
    """Send this process SIGTERM when the launcher that started it exits.

    This uses a thread, because the kernel's mechanism (``PR_SET_PDEATHSIG``) already fires when the *thread* that
    started this process exits.
    """
    if any(name in os.environ for name in STARTED_BY):
        threading.Thread(target=_watch, args=(os.getppid(), _named_launcher()), name="launcher", daemon=True).start()


def _watch(parent: int, launcher: psutil.Process | None) -> None:
    while os.getppid() == parent and (launcher is None or _is_alive(launcher)):
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _named_launcher() -> psutil.Process | None:
    with suppress(KeyError, ValueError, psutil.NoSuchProcess):
        return psutil.Process(int(os.environ[LAUNCHER]))
    return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
