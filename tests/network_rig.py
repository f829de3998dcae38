"""Hosts in network namespaces of their own: names, interfaces and addresses as on different machines, cables to cut."""

import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster_tools import LAUNCH, ROOT, Program, launch_environment, require, require_privilege

TORCHRUN = LAUNCH / "torchrun.sh"


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True, timeout=30)


class Host:
    """A host: its name resolves nowhere, and beside the network that all share it has another one that leads nowhere.

    Attributes:
        address, address6: on the shared network.
        interface: which leads there; called differently on each host.
    """

    def __init__(self, lab: str, number: int) -> None:
        self.name, self.interface = f"host{number}", f"lan{chr(ord('a') + number)}"
        self.space, self._switch, self._port = f"{lab}-{self.name}", f"{lab}-switch", f"port{number}"
        self.address, self.address6 = f"10.77.0.{number + 1}", f"fd77::{number + 1}"
        self.programs: list[Program] = []
        ip("netns", "add", self.space)
        inside = ("-n", self.space)
        ip(*inside, "link", "set", "lo", "up")
        # The first interface that a library comes across is the wrong one.
        ip(*inside, "link", "add", "aaa0", "type", "veth", "peer", "name", "aaa1")
        ip(*inside, "addr", "add", f"10.99.{number}.1/24", "dev", "aaa0")
        ip(*inside, "link", "set", "aaa0", "up")
        peer = ("peer", "name", self._port, "netns", self._switch)
        ip(*inside, "link", "add", self.interface, "type", "veth", *peer)
        ip(*inside, "addr", "add", f"{self.address}/24", "dev", self.interface)
        ip(*inside, "addr", "add", f"{self.address6}/64", "dev", self.interface, "nodad")
        ip(*inside, "link", "set", self.interface, "up")
        ip("-n", self._switch, "link", "set", self._port, "master", "switch", "up")

    def cut(self) -> None:
        """Pull the cable: what is sent gets lost, nobody is told."""
        ip("-n", self._switch, "link", "set", self._port, "nomaster")

    def mend(self) -> None:
        ip("-n", self._switch, "link", "set", self._port, "master", "switch")

    def start(self, output: Path, *words: Any) -> Program:
        """A program on this host."""
        named = ("unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', self.name)
        enter = ("ip", "netns", "exec", self.space, *named)
        program = Program([*enter, *words], output, environment())
        self.programs.append(program)
        return program

    def kill(self) -> None:
        """The power is cut: every process at once."""
        pids = subprocess.run(["ip", "netns", "pids", self.space], capture_output=True, text=True, timeout=30).stdout
        for pid in pids.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for program in self.programs:
            program.end()
        self.programs.clear()


@contextmanager
def lab(size: int) -> Iterator[list[Host]]:
    """Hosts that share a network; they go, with all that runs on them, at the end."""
    require("ip", "tc", "unshare", packages="iproute2 util-linux")
    require_privilege("unshare", "--net", "--uts", "true", what="network namespaces")
    name = f"inrank-{uuid.uuid4().hex[:6]}"
    hosts: list[Host] = []
    try:
        ip("netns", "add", f"{name}-switch")
        ip("-n", f"{name}-switch", "link", "add", "switch", "up", "type", "bridge")
        for number in range(size):
            hosts.append(Host(name, number))
        yield hosts
    finally:
        for host in hosts:
            host.kill()
        there = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=30).stdout.split()
        for space in there:
            if space.startswith(name):
                ip("netns", "delete", space)


def environment() -> dict[str, str]:
    """For what runs on a host: the tests' own modules as well, one thread."""
    own = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return launch_environment() | own
