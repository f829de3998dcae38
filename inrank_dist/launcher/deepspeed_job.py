"""Command line of ``launch/deepspeed.sh``: options, hostfile and GPUs, validated before anything is started."""

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
from .common import parse_command_line
from .network import PORT, is_local_address, resolve, split_endpoint

HELP = """\
this machine:   launch/deepspeed.sh -n 2 train --config my.yaml --parallel.engine zero3
over ssh:       launch/deepspeed.sh -f hosts train --config my.yaml       once; pdsh starts the other hosts
without ssh:    launch/deepspeed.sh -f hosts -k 0 -m node1 train --config my.yaml    on node1, and
                launch/deepspeed.sh -f hosts -k 1 -m node1 train --config my.yaml    on the next

FILE has a line 'HOST slots=PROCESSES' for each host. The checkout, the environment and the run folder must have the
same path on all hosts. Only OMP_NUM_THREADS, variables that begin with PYTHON (with GPUs also NCCL), and the lines
NAME=VALUE of ~/.deepspeed_env are passed over ssh. CUDA_VISIBLE_DEVICES selects GPUs as usual; empty selects the CPU.

Exit status: 0 done; 75 saved and stopped on request, run it again; 2 user error, reported in one line; 1 a process or
node was lost. SIGTERM, SIGINT and SIGUSR1 make the training save and stop. DeepSpeed kills processes that are still
running 30 s after the first one has exited. INRANK_VENV names the virtual environment (default: .venv of the checkout
if it exists, else whatever is on PATH)."""


@dataclass(frozen=True)
class Job:
    """The processes to start.

    Attributes:
        options: of the DeepSpeed launcher.
        variables: environment variables of every process, in addition to the launcher's.
        remote: hosts to reach over ssh; empty if only this machine's processes are started from here.
        command: the inrank command and its arguments.
    """

    options: list[str]
    variables: dict[str, str]
    remote: list[str]
    command: list[str]


def read_job(argv: Sequence[str]) -> Job:
    """Parse the command line.

    Raises:
        UserError: with what to write instead.
    """
    parser = Parser(
        prog="launch/deepspeed.sh",
        usage="launch/deepspeed.sh [-n PROCESSES] [-f FILE] [-m HOST[:PORT]] [-k NODE_RANK] COMMAND [ARGUMENTS ...]",
        description="Run an inrank command with the DeepSpeed launcher, on one host or several.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=HELP,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-n", dest="processes", type=int, help="processes per host (default: its slots; without -f its GPUs, or 1)")
    add("-f", dest="file", metavar="FILE", help="hostfile (default: this machine only)")
    add(
        "-m",
        dest="endpoint",
        metavar="HOST[:PORT]",
        help=f"rendezvous endpoint, on the first host of FILE (default port: {PORT})",
    )
    add("-k", dest="node_rank", type=int, help="index of this host in FILE, from 0; starts it without ssh")
    options = parse_command_line(parser, argv)
    if options.file is not None:
        return _multi_host_job(options, read_hostfile(options.file))
    for name, value in (("-m", options.endpoint), ("-k", options.node_rank)):
        if value is not None:
            raise UserError(f"{name} is {value} but there is no hostfile; write -f FILE, or leave {name} out")
    count = options.processes or len(visible_gpus()) or 1
    # Without a hostfile DeepSpeed uses /job/hostfile if it exists.
    flags = ["--hostfile", os.devnull, "--num_gpus", str(count), *_master("127.0.0.1", _free_port())]
    return Job(flags, _variables(count, f"-n is {count}"), [], options.command)


def _multi_host_job(options: argparse.Namespace, hosts: dict[str, int]) -> Job:
    flags, names = ["--hostfile", options.file], list(hosts)
    if options.processes is not None:
        smallest = min(hosts, key=lambda host: hosts[host])
        if options.processes > hosts[smallest]:
            raise UserError(
                f"-n is {options.processes}, but {smallest} has slots={hosts[smallest]} in {options.file}; write at "
                "most that"
            )
        flags += ["--num_gpus", str(options.processes)]
        hosts = dict.fromkeys(hosts, options.processes)
    if options.node_rank is not None and not 0 <= options.node_rank < len(hosts):
        raise UserError(
            f"-k is {options.node_rank}, but {options.file} has {len(hosts)} host(s); write a number from 0 to "
            f"{len(hosts) - 1}"
        )
    endpoint = split_endpoint(options.endpoint) if options.endpoint else None
    if endpoint:
        resolve(endpoint[0])
    if options.node_rank is not None:
        if endpoint is None:
            raise UserError(f"-k is {options.node_rank} but -m is missing; write -m {names[0]}, the same on every host")
        flags += ["--no_ssh", "--node_rank", str(options.node_rank), *_master(*endpoint)]
        return Job(flags, _variables(*_slots(hosts, options.node_rank)), [], options.command)
    # DeepSpeed checks ssh to the first host only and fails with a traceback; launch() checks all hosts.
    flags += ["--no_ssh_check"]
    if len(hosts) == 1 and is_local_address(resolve(names[0])):
        flags += _master(*(endpoint or ("127.0.0.1", _free_port())))
        return Job(flags, _variables(*_slots(hosts, 0)), [], options.command)
    if not shutil.which("pdsh"):
        raise UserError(
            f"pdsh, with which DeepSpeed starts the hosts of {options.file}, is not installed; install it (Debian: "
            "apt-get install pdsh), or start every host yourself with -k and -m"
        )
    endpoint = endpoint or (names[0], PORT)
    if not options.endpoint and len(hosts) > 1 and resolve(names[0]).startswith(("127.", "::1")):
        raise UserError(
            f"{names[0]}, the first host of {options.file}, is a loopback address here, which other hosts resolve to "
            "themselves; write -m HOST with the address by which they reach it"
        )
    flags += ["--force_multi", *_master(*endpoint)]  # otherwise a single remote host would be started here
    return Job(flags, _remote_variables(hosts), names, options.command)


def _slots(hosts: dict[str, int], node_rank: int) -> tuple[int, str]:
    host = list(hosts)[node_rank]
    return hosts[host], f"{host} has slots={hosts[host]}"


def read_hostfile(file: str) -> dict[str, int]:
    """Read the number of slots of each host, in order.

    Raises:
        UserError: the DeepSpeed launcher would fail with this file, or would not start what it says.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
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
            raise UserError(f"{host} appears twice in {file}; write one line for it, with all its slots")
        hosts[host] = slots
    if not hosts:
        raise UserError(f"{file} names no host; write a line HOST slots=N for each")
    return hosts


def visible_gpus() -> list[str]:
    """GPUs of this machine that may be used, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # CUDA ignores everything after the first invalid entry
        return list(takewhile(lambda name: name and not name.startswith("-"), visible.split(",")))
    try:
        listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    except OSError:
        return []
    return [str(number) for number, _ in enumerate(re.findall("^GPU ", listing, re.MULTILINE))]


def _variables(count: int, requested: str) -> dict[str, str]:
    """For local processes. DeepSpeed would set CUDA_VISIBLE_DEVICES to 0, 1, ..., even on a machine without GPUs."""
    gpus = visible_gpus()
    if not gpus:
        return {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    if count > len(gpus):
        raise UserError(f"{requested}, but there are {len(gpus)} GPUs; write at most that")
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[:count])}


def _remote_variables(hosts: dict[str, int]) -> dict[str, str]:
    """For processes on remote hosts, which use the GPUs of those hosts unless the CPU is selected here."""
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


def _master(host: str, port: int) -> list[str]:
    return ["--master_addr", host, "--master_port", str(port)]


def _free_port() -> int:
    """DeepSpeed's default port is fixed, so two jobs on one machine would collide."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
