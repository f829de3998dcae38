"""The deepspeed launcher for the commands of inrank: on this machine, over ssh, or started by hand on every host.

``python -m inrank_dist.launcher.deepspeed [OPTIONS] COMMAND [WORDS ...]``; ``launch/deepspeed.sh`` calls it. The
launcher is DeepSpeed's own. What it lacks is here and in ``deepspeed_job``: it tells mistakes by tracebacks, passes no
signal on, returns 0 when it is killed, shows its processes the GPUs 0, 1, ... whatever it was shown itself, and has a
remote shell read the words.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TextIO
from urllib.parse import quote, unquote

import psutil

from ..runtime import console
from ..runtime.errors import EXIT_MISTAKE, UserError
from ..runtime.parent import LAUNCH, LAUNCHER
from ..runtime.signals import EXIT_STOPPED, stop_signals
from .common import SHUTDOWN_SECONDS, killed
from .deepspeed_job import Job, read_job
from .network import settings_for, shown

PROCESS, SIGNAL = "--process", "--signal"
"""First words of the calls that this module makes to itself."""


def launch(job: Job, asked: threading.Event) -> int:
    """Run the deepspeed launcher to its end.

    Args:
        asked: set by handlers when a signal has come.

    Returns:
        Exit status of the training.

    Raises:
        UserError: deepspeed is not installed, or ssh does not reach a host.
    """
    if not shutil.which("deepspeed"):
        raise UserError("deepspeed is not installed; write pip install -e '.[deepspeed]'")
    environment = dict(os.environ)
    environment.pop("CUDA_VISIBLE_DEVICES", None)  # it goes to the processes; the launcher would say that it ignores it
    environment |= {name: value for name, value in job.variables.items() if name == "DS_ACCELERATOR"}
    if job.remote:
        append = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} -o BatchMode=yes -o ConnectTimeout=10"
        os.environ["PDSH_SSH_ARGS_APPEND"] = environment["PDSH_SSH_ARGS_APPEND"] = append.strip()
        _refuse_unreachable(job.remote)
    name = uuid.uuid4().hex
    own = {LAUNCH: name} if job.remote else {LAUNCH: name, LAUNCHER: str(os.getpid())}
    variables = [f"{key}={value}" for key, value in (own | job.variables).items()]
    command = ["deepspeed", *job.options, "--log_level", "critical", "--no_local_rank", "--no_python"]
    command += [*_myself(), PROCESS, *map(wrap, [*variables, "--", *job.words])]
    if asked.is_set():
        return EXIT_STOPPED
    # pdsh would end, and with it the training, where nobody reads what it prints.
    output = subprocess.PIPE if job.remote else None
    launcher = subprocess.Popen(
        command,
        env=environment,
        stdout=output,
        stderr=output,
        # A terminal's Ctrl-C, or a batch system that signals whoever it finds, would end it before the training.
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
    )
    copies = [_copy(launcher.stdout, sys.stdout), _copy(launcher.stderr, sys.stderr)] if job.remote else []
    while True:
        try:
            status = launcher.wait(0.5)
            break
        except subprocess.TimeoutExpired:
            if asked.is_set():  # again and again: those that are only starting hear of it as well, the others have
                _tell(job, name, signal.SIGTERM)
    for copy in copies:
        copy.join(5)
    if job.remote and status not in (0, EXIT_MISTAKE, EXIT_STOPPED):
        _tell(job, name, signal.SIGTERM)
    left = _signal(name, signal.SIGTERM)  # the launcher was killed, for which it returns 0
    for process in psutil.wait_procs(left, SHUTDOWN_SECONDS)[1]:
        process.kill()
    if left:
        print("the deepspeed launcher was killed; the processes that it left have been stopped", file=sys.stderr)
        return 1
    if asked.is_set() and status == 256 - signal.SIGTERM:
        return EXIT_STOPPED  # the signal itself ended a process that was still starting: nothing is lost
    if status in (0, EXIT_MISTAKE, EXIT_STOPPED):
        return status
    if 256 - status in set(signal.Signals):
        print(killed("a process", 256 - status), file=sys.stderr)
    return 1


def training_processes(name: str) -> list[psutil.Process]:
    """Those of this machine that a launch has started. What they started in turn has their mark, with another pid."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(LAUNCH) == f"{name} {process.pid}":
                found.append(process)
        except psutil.Error:  # another user's, or gone
            continue
    return found


def _copy(source: IO[bytes] | None, target: TextIO) -> threading.Thread:
    """Pass on what is written, line by line, in a thread."""

    def work() -> None:
        for line in source or ():
            target.buffer.write(line)
            target.flush()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _tell(job: Job, name: str, number: signal.Signals) -> None:
    if not job.remote:
        _signal(name, number)
        return
    words = [f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}", *_myself(), SIGNAL, name, number.name]
    _pdsh(job.remote, f"cd {shlex.quote(os.getcwd())} && env {shlex.join(words)}")
    time.sleep(2)


def _signal(name: str, number: signal.Signals) -> list[psutil.Process]:
    processes = training_processes(name)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    return processes


def _refuse_unreachable(hosts: list[str]) -> None:
    done = _pdsh(hosts, "true")
    if done.returncode:
        said = " ".join(done.stderr.split("\n")[0].split())
        raise UserError(
            f"ssh does not reach every host ({said}); write hosts that 'ssh HOST true' reaches without a password, or "
            "start every host yourself with -k and -m"
        )


def _pdsh(hosts: list[str], command: str) -> "subprocess.CompletedProcess[str]":
    words = ["pdsh", "-R", "ssh", "-S", "-w", ",".join(hosts), command.replace("%", "%%")]
    return subprocess.run(words, capture_output=True, text=True)


def _myself() -> list[str]:
    return [sys.executable, "-u", "-m", "inrank_dist.launcher.deepspeed"]


def wrap(word: str) -> str:
    """A word in characters that mean nothing to pdsh and to the shell at the other end."""
    return quote(word, safe="/:,=@+").replace("~", "%7E") or "%"


def unwrap(word: str) -> str:
    return "" if word == "%" else unquote(word)


def become(words: Sequence[str]) -> None:
    """Become one process of the training: called by the deepspeed launcher on each host, once for each process.

    Args:
        words: NAME=VALUE for the environment, ``--``, the command, all wrapped.

    Raises:
        UserError: this host's network does not allow it.
    """
    plain = [unwrap(word) for word in words]
    end = plain.index("--")
    for variable in plain[:end]:
        name, _, value = variable.partition("=")
        os.environ[name] = value
    os.environ[LAUNCH] += f" {os.getpid()}"  # which it stays
    settings = settings_for(os.environ["MASTER_ADDR"], int(os.environ["LOCAL_SIZE"]))
    if os.environ["LOCAL_RANK"] == "0":
        print(shown(settings), flush=True)
    os.environ.update(settings)
    # What DeepSpeed builds needs the tools of the environment, which ssh has not entered.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # ignored since the launcher was started
    os.execv(sys.executable, [sys.executable, "-u", "-m", "inrank_dist", *plain[end + 1 :]])


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: that of the training; 2 the user's mistake; 1 a process or node was lost."""
    words = list(sys.argv[1:] if words is None else words)
    try:
        if words[:1] == [PROCESS]:
            become(words[1:])
        if words[:1] == [SIGNAL]:
            _signal(words[1], signal.Signals[words[2]])
            return 0
        asked = threading.Event()
        for number in stop_signals():
            signal.signal(number, lambda *_: asked.set())
        return launch(read_job(words), asked)
    except UserError as error:
        if words[:1] != [PROCESS] or os.environ["LOCAL_RANK"] == "0":  # one voice a host
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    console.guard(outlive=True)
    sys.exit(main())
