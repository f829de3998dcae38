"""Runs inrank commands with the DeepSpeed launcher: on this machine, over ssh, or started by hand on every host.

``python -m inrank_dist.launcher.deepspeed [OPTIONS] COMMAND [ARGUMENTS ...]``; ``launch/deepspeed.sh`` calls it. This
module and ``deepspeed_job`` work around the following behaviour of DeepSpeed's launcher: it reports mistakes as
tracebacks, does not forward signals, returns 0 when it is killed, always gives its processes the GPUs 0, 1, ...
regardless of its own CUDA_VISIBLE_DEVICES, and lets a remote shell parse the arguments.
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
from ..runtime.errors import EXIT_MISTAKE, UserError, install
from ..runtime.parent import LAUNCH, LAUNCHER
from ..runtime.signals import EXIT_STOPPED, stop_signals
from .common import SHUTDOWN_SECONDS, describe_kill
from .deepspeed_job import Job, read_job
from .network import describe_settings, settings_for

PROCESS, SIGNAL = "--process", "--signal"
"""Internal subcommands with which this module calls itself."""


def launch(job: Job, stop_requested: threading.Event) -> int:
    """Run the DeepSpeed launcher until it exits.

    Args:
        stop_requested: set by signal handlers.

    Returns:
        Exit status of the command.

    Raises:
        UserError: DeepSpeed is not installed, or ssh cannot reach a host.
    """
    if not shutil.which("deepspeed"):
        raise UserError(f"deepspeed is not installed; {install('deepspeed')}")
    environment = dict(os.environ)
    environment.pop("CUDA_VISIBLE_DEVICES", None)  # set per process instead; the launcher would warn and ignore it
    environment |= {name: value for name, value in job.variables.items() if name == "DS_ACCELERATOR"}
    if job.remote:
        append = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} -o BatchMode=yes -o ConnectTimeout=10"
        os.environ["PDSH_SSH_ARGS_APPEND"] = environment["PDSH_SSH_ARGS_APPEND"] = append.strip()
        _refuse_unreachable(job.remote)
    name = uuid.uuid4().hex
    mark = {LAUNCH: name} if job.remote else {LAUNCH: name, LAUNCHER: str(os.getpid())}
    variables = [f"{key}={value}" for key, value in (mark | job.variables).items()]
    command = ["deepspeed", *job.options, "--log_level", "critical", "--no_local_rank", "--no_python"]
    command += [*_this_module(), PROCESS, *map(encode_argument, [*variables, "--", *job.command])]
    if stop_requested.is_set():
        return EXIT_STOPPED
    # pdsh, and with it the training, would exit once nobody reads its output.
    output = subprocess.PIPE if job.remote else None
    launcher = subprocess.Popen(
        command,
        env=environment,
        stdout=output,
        stderr=output,
        # Ctrl-C, or a batch system that signals the process group, would kill the launcher before the training saves.
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
    )
    forwarders = [_forward(launcher.stdout, sys.stdout), _forward(launcher.stderr, sys.stderr)] if job.remote else []
    while True:
        try:
            status = launcher.wait(0.5)
            break
        except subprocess.TimeoutExpired:
            if stop_requested.is_set():  # repeated, to reach processes that were still starting; others ignore it
                _signal_job(job, name, signal.SIGTERM)
    for forwarder in forwarders:
        forwarder.join(5)
    if job.remote and status not in (0, EXIT_MISTAKE, EXIT_STOPPED):
        _signal_job(job, name, signal.SIGTERM)
    left = _signal_local(name, signal.SIGTERM)  # if the launcher was killed, it returns 0 and leaves processes behind
    for process in psutil.wait_procs(left, SHUTDOWN_SECONDS)[1]:
        process.kill()
    if left:
        print("the deepspeed launcher was killed; the processes that it left have been stopped", file=sys.stderr)
        return 1
    if stop_requested.is_set() and status == 256 - signal.SIGTERM:
        return EXIT_STOPPED  # the signal ended a process that was still starting: there was nothing to save
    if status in (0, EXIT_MISTAKE, EXIT_STOPPED):
        return status
    if 256 - status in set(signal.Signals):
        print(describe_kill("a process", 256 - status), file=sys.stderr)
    return 1


def training_processes(name: str) -> list[psutil.Process]:
    """Processes that a launch has started on this machine. Their children inherit the mark, but with another pid."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(LAUNCH) == f"{name} {process.pid}":
                found.append(process)
        except psutil.Error:  # belongs to another user, or has exited
            continue
    return found


def _forward(source: IO[bytes] | None, target: TextIO) -> threading.Thread:
    """Copy a stream line by line in a thread."""

    def copy() -> None:
        for line in source or ():
            target.buffer.write(line)
            target.flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def _signal_job(job: Job, name: str, number: signal.Signals) -> None:
    if not job.remote:
        _signal_local(name, number)
        return
    argv = [f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}", *_this_module(), SIGNAL, name, number.name]
    _pdsh(job.remote, f"cd {shlex.quote(os.getcwd())} && env {shlex.join(argv)}")
    time.sleep(2)


def _signal_local(name: str, number: signal.Signals) -> list[psutil.Process]:
    processes = training_processes(name)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    return processes


def _refuse_unreachable(hosts: list[str]) -> None:
    result = _pdsh(hosts, "true")
    if result.returncode:
        reason = " ".join(result.stderr.split("\n")[0].split())
        raise UserError(
            f"ssh does not reach every host ({reason}); write hosts that 'ssh HOST true' reaches without a password, "
            "or start every host yourself with -k and -m"
        )


def _pdsh(hosts: list[str], command: str) -> "subprocess.CompletedProcess[str]":
    argv = ["pdsh", "-R", "ssh", "-S", "-w", ",".join(hosts), command.replace("%", "%%")]
    return subprocess.run(argv, capture_output=True, text=True)


def _this_module() -> list[str]:
    return [sys.executable, "-u", "-m", "inrank_dist.launcher.deepspeed"]


def encode_argument(argument: str) -> str:
    """Encode an argument in characters that are special neither to pdsh nor to the remote shell."""
    return quote(argument, safe="/:,=@+").replace("~", "%7E") or "%"


def decode_argument(argument: str) -> str:
    return "" if argument == "%" else unquote(argument)


def exec_process(argv: Sequence[str]) -> None:
    """Turn into one training process. The DeepSpeed launcher calls this on each host, once for each process.

    Args:
        argv: NAME=VALUE for the environment, ``--``, then the command; all encoded.

    Raises:
        UserError: this host's network settings do not work.
    """
    plain = [decode_argument(argument) for argument in argv]
    end = plain.index("--")
    for variable in plain[:end]:
        name, _, value = variable.partition("=")
        os.environ[name] = value
    os.environ[LAUNCH] += f" {os.getpid()}"  # exec keeps the pid
    settings = settings_for(os.environ["MASTER_ADDR"], int(os.environ["LOCAL_SIZE"]))
    if os.environ["LOCAL_RANK"] == "0":
        print(describe_settings(settings), flush=True)
    os.environ.update(settings)
    # DeepSpeed's JIT builds need the tools of the virtual environment, which ssh has not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # the launcher was started with it ignored
    os.execv(sys.executable, [sys.executable, "-u", "-m", "inrank_dist", *plain[end + 1 :]])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: that of the command; 2 for a user error; 1 if a process or node was lost."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == [PROCESS]:
            exec_process(argv[1:])
        if argv[:1] == [SIGNAL]:
            _signal_local(argv[1], signal.Signals[argv[2]])
            return 0
        stop_requested = threading.Event()
        for number in stop_signals():
            signal.signal(number, lambda *_: stop_requested.set())
        return launch(read_job(argv), stop_requested)
    except UserError as error:
        if argv[:1] != [PROCESS] or os.environ["LOCAL_RANK"] == "0":  # log once per host
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    console.guard(outlive=True)
    sys.exit(main())
