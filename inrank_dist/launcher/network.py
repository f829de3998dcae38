"""Finds the network interface that leads to the other nodes, and the settings that NCCL and gloo need for it."""

import errno
import ipaddress
import os
import re
import socket
from pathlib import Path

import psutil

from ..runtime.errors import UserError

PORT = 29400
"""Default port of the rendezvous endpoint, as for torchrun."""


LOOPBACK = "127.0.0.1"
"""Rendezvous address of a job with one node; other machines cannot reach it."""


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Split ``HOST[:PORT]``. An IPv6 address with a port is written in brackets, ``[fd00::1]:29400``.

    Raises:
        UserError: ``endpoint`` is neither.
    """
    bare = endpoint.count(":") > 1 and not endpoint.startswith("[")  # an IPv6 address without a port
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%\w]+)\]|([\w.-]+))(?::(\d+))?", endpoint)
    if bare:
        try:
            ipaddress.ip_address(endpoint.partition("%")[0])
        except ValueError:
            raise UserError(f"{endpoint!r} is not an address; write one such as [fd00::1]:{PORT}") from None
        host, port = endpoint, str(PORT)
    elif match:
        host, port = match[1] or match[2], match[3] or str(PORT)
    else:
        raise UserError(
            f"{endpoint!r} is not a rendezvous endpoint; write HOST or HOST:PORT, such as node1:{PORT} or [fd00::1]"
        )
    if not 0 < int(port) < 2**16:
        raise UserError(f"the port of {endpoint} is {port}; write a port from 1 to 65535")
    return host, int(port)


def resolve(host: str) -> str:
    """Resolve a host name to a numeric address that the other nodes can use.

    Many systems resolve their own name to 127.0.1.1, which every node takes for itself. In that case this returns the
    address of this machine's network interface, if it has exactly one.

    Raises:
        UserError: the name cannot be resolved, or this machine has several addresses to choose from.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(
            f"{socket.gethostname()} cannot resolve the host name {host} ({getattr(error, 'strerror', error)}); write "
            "its address instead, or add it to DNS or to /etc/hosts of every node"
        ) from None
    addresses = [str(each[4][0]) for each in found]
    if host == "localhost" or host in addresses:
        return addresses[0]
    routable = [address for address in addresses if _is_routable(address)] or _local_addresses()
    if not routable or (len(routable) > 1 and not _is_routable(addresses[0])):
        choice = f", one of {', '.join(routable)}" if routable else ""
        raise UserError(
            f"{host} is {addresses[0]} on {socket.gethostname()}, which no other node can reach; write its address in "
            f"the network that the nodes share{choice}"
        )
    return routable[0]


def _is_routable(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return not (parsed.is_loopback or parsed.is_link_local)


def _local_addresses() -> list[str]:
    """One address of each network interface that is up, IPv4 if it has one."""
    states, found = psutil.net_if_stats(), []
    for name, addresses in psutil.net_if_addrs().items():
        if name in states and states[name].isup:
            for family in (socket.AF_INET, socket.AF_INET6):
                local = [each.address for each in addresses if each.family == family and _is_routable(each.address)]
                if local:
                    found.append(local[0])
                    break
    return found


def is_local_address(address: str) -> bool:
    """Whether this machine has an address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def address_towards(address: str) -> str:
    """This machine's source address for packets to another address. Nothing is sent.

    Raises:
        UserError: this machine has no route to the address.
    """
    if is_local_address(address):
        return address
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, PORT))
        except OSError as error:
            why = os.strerror(error.errno or errno.ENETUNREACH)
            raise UserError(
                f"{socket.gethostname()} has no route to {address} ({why}); write an address of the network that the "
                "nodes share, or fix the route"
            ) from None
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """Name of the network interface that has a local address."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if ipaddress.ip_address(each.address.partition("%")[0]) == wanted:
                return str(name)
    if wanted.is_loopback:  # lo answers for all of 127.0.0.0/8 but lists one address
        return interface_of("127.0.0.1")
    raise UserError(
        f"{socket.gethostname()} has no network interface with the address {address}; write another address of it"
    )


def reachable(address: str, port: int, seconds: float) -> bool:
    """Whether something accepts connections at an endpoint."""
    try:
        with socket.create_connection((address, port), timeout=seconds):
            return True
    except OSError:
        return False


def settings_for(host: str, processes: int) -> dict[str, str]:
    """Environment variables for the processes of this node. Variables that the user has set are left alone.

    Args:
        host: name or address at which the nodes meet; ``localhost`` for a job with one node.
        processes: number of processes on this node.

    Returns:
        The network interface for gloo and for NCCL's bootstrap (NCCL finds InfiniBand by itself), and the number of
        threads per process.

    Raises:
        UserError: the host is unknown or unreachable, or a variable names an interface that does not exist.
    """
    interface = interface_of(address_towards(resolve(host)))
    wanted = {"GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": str(max(_cores() // processes, 1))}
    if not interface.startswith("lo"):
        wanted["NCCL_SOCKET_IFNAME"] = f"={interface}"  # "=": exact name; by default NCCL matches a prefix
    there = psutil.net_if_addrs()
    given = os.environ.get("GLOO_SOCKET_IFNAME", "")
    for name in filter(None, given.split(",")):
        if name not in there:
            raise UserError(
                f"GLOO_SOCKET_IFNAME is {given}, but {socket.gethostname()} has no interface {name}; write "
                f"{interface}, or unset it to select the interface automatically"
            )
    return {name: value for name, value in wanted.items() if name not in os.environ}


def describe_settings(settings: dict[str, str]) -> str:
    """One line with the settings of this node: those found here, and those set by the user."""
    parts = [f"{name} {value}" for name, value in settings.items()]
    given = [name for name in os.environ if name.startswith(("NCCL_", "GLOO_")) or name == "OMP_NUM_THREADS"]
    parts += [f"{name} {os.environ[name]} (given)" for name in sorted(given) if name not in settings]
    cards = Path("/sys/class/infiniband")
    fabric = sorted(card.name for card in cards.iterdir()) if cards.is_dir() else []
    if fabric:
        parts.append(f"InfiniBand {', '.join(fabric)}")
    return f"{socket.gethostname()}: {', '.join(parts)}"


def _cores() -> int:
    """CPU cores for this node's processes: as Slurm allocated them, else those this process may run on."""
    tasks = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(tasks) if tasks.isdecimal() else len(os.sched_getaffinity(0))
