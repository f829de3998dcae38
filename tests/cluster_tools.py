"""What the tests of clusters share: real programs, installed where they are missing, and an end to all of them."""

import fcntl
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import small_config

from inrank_dist.config import Config

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"


def launch_environment() -> dict[str, str]:
    """In which the scripts of ``launch/`` take the Python of the tests."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "INRANK_VENV": "/nowhere"}


@functools.cache
def require(*programs: str, packages: str) -> None:
    """See that the programs are there; install Debian packages (names, apart by blanks) where they are not.

    Skips the test where the platform does not let us, and says so. A failing installation fails the test.
    """
    missing = [program for program in programs if not shutil.which(program)]
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip(f"{', '.join(missing)} missing; only root on Debian and its kin can install {packages} here")
    options = ["-o", "DPkg::Lock::Timeout=300", "-qq"]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with open(Path(tempfile.gettempdir()) / "inrank-apt.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        apt = functools.partial(subprocess.run, env=environment, timeout=400, capture_output=True, text=True)
        apt(["apt-get", *options, "update"])  # where one of many sources does not answer, the others may do
        done = apt(["apt-get", *options, "install", "-y", "--no-install-recommends", *packages.split()])
    assert done.returncode == 0, done.stderr
    missing = [program for program in programs if not shutil.which(program)]
    assert not missing, f"{packages} installed, but {missing} still missing"


def require_privilege(*command: str, what: str) -> None:
    """Skip where a harmless command shows that the platform lacks a privilege (``what``)."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip(f"this platform does not allow {what}: {' '.join(command)}: {done.stderr.strip()[-200:]}")


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


PATIENCE = 3
"""Limits are of a quiet machine; a loaded one gets so many times as long."""


def wait_until(condition: Callable[[], Any], timeout: float = 150, what: Callable[[], object] = lambda: "") -> Any:
    """Wait for something to become true and return it; ``what`` says what is there when it does not come."""
    deadline = time.monotonic() + PATIENCE * timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)
    return value


def processes_of(folder: Path) -> list[psutil.Process]:
    """Everything that runs with a word of this folder: script, launchers, training."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and str(folder) in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Afterwards every process whose command line names the folder is gone."""
    try:
        yield
    finally:
        for process in processes_of(folder):
            with suppress(psutil.NoSuchProcess):
                process.kill()


@contextmanager
def ssh_server(folder: Path, *addresses: str) -> Iterator[int]:
    """The port of an ssh server on addresses of this machine, which lets in whoever has the key ``folder/user``."""
    require("sshd", "ssh", packages="openssh-server openssh-client")
    folder.mkdir(0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    port = free_port()
    (folder / "server").write_text(
        "".join(f"ListenAddress {address}:{port}\n" for address in addresses)
        + f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        + "PidFile none\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
    )
    empty = Path("/run/sshd")  # which root's server insists on, and Debian makes when it boots
    made = os.geteuid() == 0 and not empty.exists()
    if made:
        empty.mkdir()
    server = Program([shutil.which("sshd"), "-D", "-e", "-f", folder / "server"], folder / "log")
    try:
        wait_until(lambda: server.text.count("Server listening") == len(addresses), what=lambda: server.text)
        yield port
    finally:
        server.end()
        if made:
            empty.rmdir()


def sockets_of(process: int, state: str) -> list[tuple[str, str]]:
    """Own and other address (hexadecimal, as the kernel writes them) of a process's TCP sockets in a state, such as
    ``0A`` for listening and ``01`` for connected."""
    held = set()
    for file in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            held.add(os.readlink(file))
    tables = [Path(f"/proc/{process}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables for row in table.splitlines()]
    return [(row[1], row[2]) for row in rows if row[3] == state and f"socket:[{row[9]}]" in held]


def listens_beyond_loopback(process: int) -> list[str]:
    """Addresses on which a process can be reached from elsewhere."""
    loopback = ("0100007F:", "00000000000000000000000001000000:", "0000000000000000FFFF00000100007F:")
    return [address for address, _ in sockets_of(process, "0A") if not address.startswith(loopback)]


class Program:
    """A program in a session of its own, what it writes in a file; ``end`` kills it with all that it started."""

    def __init__(self, words: list[Any], output: Path, environment: Mapping[str, str] | None = None) -> None:
        self.output = output
        with output.open("a") as file:
            self.process = subprocess.Popen(
                [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=ROOT,
                env=dict(environment or os.environ), start_new_session=True,
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait(self, timeout: float) -> int:
        """Its exit status; a hang fails."""
        try:
            return self.process.wait(PATIENCE * timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.process.args} hangs after {PATIENCE * timeout} s; it wrote:\n{self.text}"
            ) from None

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


def job_config(corpus: Path, folder: Path, **changes: Any) -> tuple[Config, Path]:
    """``runs.small_config`` of one block with its run in ``folder``/run, and the YAML file of it in ``folder``."""
    settings = {"run__dir": folder / "run", "train__micro_batch_size": 4, "model__num_layers": 1}
    config = small_config(corpus, **settings | changes)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(config.to_yaml())
    return config, file
