"""What ``launch/deepspeed.sh`` is asked for: its options, the hostfile, the GPUs. Everything that can be wrong before
anything is started is told here, in one line."""

import argparse
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from ..commands.main import Parser
from ..runtime.errors import UserError
from .common import read_words
from .network import PORT, is_here, resolve, split_endpoint

HELP = """\
this machine:   launch/deepspeed.sh -n 2 train --config my.yaml --parallel.engine zero3
by ssh:         launch/deepspeed.sh -f hosts train --config my.yaml       once; pdsh starts the others
without ssh:    launch/deepspeed.sh -f hosts -k 0 -m node1 train --config my.yaml    on node1, and
                launch/deepspeed.sh -f hosts -k 1 -m node1 train --config my.yaml    on the next

FILE has a line 'HOST slots=PROCESSES' for each host. Checkout, environment and run folder must be at the same place
on all hosts. By ssh go OMP_NUM_THREADS, variables that begin with PYTHON (with GPUs also NCCL), and the lines
NAME=VALUE of ~/.deepspeed_env; no others. CUDA_VISIBLE_DEVICES chooses GPUs as always; empty: the CPU.

Exit status: 0 done; 75 saved and stopped on request, run it again; 2 a mistake, said in one line; 1 a process or
node was lost. SIGTERM, SIGINT and SIGUSR1 make the training save and stop; deepspeed kills what has not ended 30 s
after the first process has. INRANK_VENV names the virtual environment (default: .venv of the checkout if it is
there, else what is on PATH)."""


@dataclass(frozen=True)
class Job:
    """What is to be started.

    Attributes:
        options: of the deepspeed launcher.
        variables: of every process, besides the launcher's.
        remote: hosts to be reached by ssh; empty: this machine alone is started from here.
        words: of the command.
    """

    options: list[str]
    variables: dict[str, str]
    remote: list[str]
    words: list[str]


def read_job(words: Sequence[str]) -> Job:
    """The command line.

    Raises:
        UserError: with what to write instead.
    """
    parser = Parser(
        prog="launch/deepspeed.sh",
        usage="launch/deepspeed.sh [-n PROCESSES] [-f FILE] [-m HOST[:PORT]] [-k NODE_RANK] COMMAND [WORDS ...]",
        description="The deepspeed launcher for the commands of inrank, on one host or on many.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=HELP,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-n", dest="processes", type=int, help="processes on each host (default: its slots; without -f its GPUs, or 1)")
    add("-f", dest="file", metavar="FILE", help="hostfile (default: this machine alone)")
    add("-m", dest="meet", metavar="HOST[:PORT]", help=f"where all meet: the first host of FILE (default port: {PORT})")
    add("-k", dest="node_rank", type=int, help="number of this host in FILE, from 0: start it without ssh")
    given = read_words(parser, words)
    if given.file is not None:
        return _of_hosts(given, read_hostfile(given.file))
    for name, value in (("-m", given.meet), ("-k", given.node_rank)):
        if value is not None:
            raise UserError(f"{name} is {value} but there is no hostfile; write -f FILE, or leave {name} out")
    count = given.processes or len(visible_gpus()) or 1
    # Without a hostfile deepspeed takes /job/hostfile if there is one.
    options = ["--hostfile", os.devnull, "--num_gpus", str(count), *_meet("127.0.0.1", _free_port())]
    return Job(options, _variables(count, f"-n is {count}"), [], given.words)


def _of_hosts(given: argparse.Namespace, hosts: dict[str, int]) -> Job:
    options, names = ["--hostfile", given.file], list(hosts)
    if given.processes is not None:
        few = min(hosts, key=lambda host: hosts[host])
        if given.processes > hosts[few]:
            raise UserError(
                f"-n is {given.processes}, but {few} has slots={hosts[few]} in {given.file}; write at most that"
            )
        options += ["--num_gpus", str(given.processes)]
        hosts = dict.fromkeys(hosts, given.processes)
    if given.node_rank is not None and not 0 <= given.node_rank < len(hosts):
        raise UserError(
            f"-k is {given.node_rank}, but {given.file} has {len(hosts)} host(s); write a number from 0 to "
            f"{len(hosts) - 1}"
        )
    meet = split_endpoint(given.meet) if given.meet else None
    if meet:
        resolve(meet[0])
    if given.node_rank is not None:
        if meet is None:
            raise UserError(f"-k is {given.node_rank} but -m is missing; write -m {names[0]}, the same on every host")
        options += ["--no_ssh", "--node_rank", str(given.node_rank), *_meet(*meet)]
        return Job(options, _variables(*_slots(hosts, given.node_rank)), [], given.words)
    # What is wrong with ssh deepspeed tells by a traceback, and of the first host only: launch asks all of them.
    options += ["--no_ssh_check"]
    if len(hosts) == 1 and is_here(resolve(names[0])):
        options += _meet(*(meet or ("127.0.0.1", _free_port())))
        return Job(options, _variables(*_slots(hosts, 0)), [], given.words)
    if not shutil.which("pdsh"):
        raise UserError(
            f"pdsh, by which deepspeed starts the hosts of {given.file}, is not installed; install it (Debian: apt-get "
            "install pdsh), or start every host yourself with -k and -m"
        )
    meet = meet or (names[0], PORT)
    if not given.meet and len(hosts) > 1 and resolve(names[0]).startswith(("127.", "::1")):
        raise UserError(
            f"{names[0]}, the first host of {given.file}, is a loopback address here, which other hosts take for "
            "themselves; write -m HOST with the address by which they reach it"
        )
    options += ["--force_multi", *_meet(*meet)]  # else a single host that is not this one would be started here
    return Job(options, _remote_variables(hosts), names, given.words)


def _slots(hosts: dict[str, int], node_rank: int) -> tuple[int, str]:
    host = list(hosts)[node_rank]
    return hosts[host], f"{host} has slots={hosts[host]}"


def read_hostfile(file: str) -> dict[str, int]:
    """Slots of each host, in order.

    Raises:
        UserError: the deepspeed launcher would fail with it, or start something else than is written there.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no text"
        raise UserError(f"-f is {file}, which cannot be read ({why}); write a file of lines HOST slots=N") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate((line.strip() for line in lines), 1):
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([\w.:-]+)\s+slots=(\d+)", line)
        if not match:
            raise UserError(f"line {number} of {file} is {line!r}; write HOST slots=N, such as node1 slots=4")
        host, slots = match[1], int(match[2])
        if slots == 0:
            raise UserError(f"{host} has slots=0 in {file}; write a number of at least 1, or leave the line out")
        if host in hosts:
            raise UserError(f"{host} is twice in {file}; write one line for it, with all its slots")
        hosts[host] = slots
    if not hosts:
        raise UserError(f"{file} names no host; write a line HOST slots=N for each")
    return hosts


def visible_gpus() -> list[str]:
    """The GPUs of this machine that may be used, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # from the first that is none on, CUDA shows nothing
        return list(takewhile(lambda name: name and not name.startswith("-"), visible.split(",")))
    try:
        listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    except OSError:
        return []
    return [str(number) for number, _ in enumerate(re.findall("^GPU ", listing, re.MULTILINE))]


def _variables(count: int, says: str) -> dict[str, str]:
    """For the processes of this machine: deepspeed shows them the GPUs 0, 1, ..., also where there is none."""
    gpus = visible_gpus()
    if not gpus:
        return {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    if count > len(gpus):
        raise UserError(f"{says}, but there are {len(gpus)} GPUs; write at most that")
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[:count])}


def _remote_variables(hosts: dict[str, int]) -> dict[str, str]:
    """For the processes of hosts that are reached by ssh: what they have, unless the CPU is asked for."""
    variables = {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return variables
    if not visible_gpus():
        return variables | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    for host, slots in hosts.items():
        taken = ",".join(map(str, range(slots)))
        if visible != taken:
            raise UserError(
                f"CUDA_VISIBLE_DEVICES is {visible}, but {host} will use {taken}; unset it, or start every host "
                "yourself with -k and -m"
            )
    return variables


def _meet(host: str, port: int) -> list[str]:
    return ["--master_addr", host, "--master_port", str(port)]


def _free_port() -> int:
    """deepspeed's fixed one would be taken by the next job on this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
