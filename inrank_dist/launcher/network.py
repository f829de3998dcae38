"""Which way the other nodes are, and what the libraries that talk to them must be told."""

import errno
import ipaddress
import os
import re
import socket
from pathlib import Path

import psutil

from ..runtime.errors import UserError

PORT = 29400
"""Where the nodes of a job meet unless they are told another port; torchrun's own default."""


LOOPBACK = "127.0.0.1"
"""Where a job of one node meets: an address that no other machine reaches."""


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """``HOST[:PORT]`` -> host and port; IPv6 addresses with a port stand in brackets, ``[fd00::1]:29400``.

    Raises:
        UserError: it is neither.
    """
    bare = endpoint.count(":") > 1 and not endpoint.startswith("[")  # an IPv6 address without a port
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%\w]+)\]|([\w.-]+))(?::(\d+))?", endpoint)
    if bare:
        try:
            ipaddress.ip_address(endpoint.partition("%")[0])
        except ValueError:
            raise UserError(f"{endpoint!r} is no address; write it such as [fd00::1]:{PORT}") from None
        host, port = endpoint, str(PORT)
    elif match:
        host, port = match[1] or match[2], match[3] or str(PORT)
    else:
        raise UserError(f"{endpoint!r} is no place to meet; write HOST or HOST:PORT, such as node1:{PORT} or [fd00::1]")
    if not 0 < int(port) < 2**16:
        raise UserError(f"the port of {endpoint} is {port}; write one from 1 to 65535")
    return host, int(port)


def resolve(host: str) -> str:
    """The address of a host, numeric, as the other nodes may use it.

    Many systems know their own name as 127.0.1.1, which means themselves to every node: then it is the address of this
    machine's network, if it has but one.

    Raises:
        UserError: this machine knows no such host, or not which of its addresses is meant.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(
            f"{socket.gethostname()} cannot resolve the host name {host} ({getattr(error, 'strerror', error)}); write "
            "its address instead, or have it in the DNS or in /etc/hosts of every node"
        ) from None
    addresses = [str(each[4][0]) for each in found]
    if host == "localhost" or host in addresses:
        return addresses[0]
    outward = [address for address in addresses if _leads_outward(address)] or _own_addresses()
    if not outward or (len(outward) > 1 and not _leads_outward(addresses[0])):
        choice = f", one of {', '.join(outward)}" if outward else ""
        raise UserError(
            f"{host} is {addresses[0]} on {socket.gethostname()}, where no other node reaches it; write its address in "
            f"the network that the nodes share{choice}"
        )
    return outward[0]


def _leads_outward(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return not (parsed.is_loopback or parsed.is_link_local)


def _own_addresses() -> list[str]:
    """One address of each network interface that is up, IPv4 where there is one."""
    states, found = psutil.net_if_stats(), []
    for name, addresses in psutil.net_if_addrs().items():
        if name in states and states[name].isup:
            for family in (socket.AF_INET, socket.AF_INET6):
                own = [each.address for each in addresses if each.family == family and _leads_outward(each.address)]
                if own:
                    found.append(own[0])
                    break
    return found


def is_here(address: str) -> bool:
    """Whether an address is one of this machine."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def address_towards(address: str) -> str:
    """The address of this machine that another one sees; nothing is sent.

    Raises:
        UserError: no interface of this machine leads there.
    """
    if is_here(address):
        return address
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, PORT))
        except OSError as error:
            why = os.strerror(error.errno or errno.ENETUNREACH)
            raise UserError(
                f"no network of {socket.gethostname()} leads to {address} ({why}); write an address of the network "
                "that the nodes share, or see to the route"
            ) from None
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """Name of the network interface that holds an address of this machine."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if ipaddress.ip_address(each.address.partition("%")[0]) == wanted:
                return str(name)
    if wanted.is_loopback:  # all of 127.0.0.0/8 is
        return interface_of("127.0.0.1")
    raise UserError(f"no network interface of {socket.gethostname()} holds {address}")


def reachable(address: str, port: int, seconds: float) -> bool:
    """Whether something answers there."""
    try:
        with socket.create_connection((address, port), timeout=seconds):
            return True
    except OSError:
        return False


def settings_for(host: str, processes: int) -> dict[str, str]:
    """What the processes of this node are told beside what the user has set, which stays.

    Args:
        host: where the nodes meet, name or address; ``localhost`` for a job of one node.
        processes: of this node.

    Returns:
        Environment variables: the network interface on which NCCL (for its first contact; InfiniBand it finds by
        itself) and gloo talk to the other nodes, and the threads of each process.

    Raises:
        UserError: the host is not known or not to be reached, or a variable names an interface that is not there.
    """
    interface = interface_of(address_towards(resolve(host)))
    wanted = {"GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": str(max(_cores() // processes, 1))}
    if not interface.startswith("lo"):
        wanted["NCCL_SOCKET_IFNAME"] = f"={interface}"  # this very name, not all that begin like it
    there = psutil.net_if_addrs()
    given = os.environ.get("GLOO_SOCKET_IFNAME", "")
    for name in filter(None, given.split(",")):
        if name not in there:
            raise UserError(
                f"GLOO_SOCKET_IFNAME is {given}, but {socket.gethostname()} has no interface {name}; write "
                f"{interface}, or unset it to have it found"
            )
    return {name: value for name, value in wanted.items() if name not in os.environ}


def shown(settings: dict[str, str]) -> str:
    """One line on what this node will use: found here, or set by the user."""
    parts = [f"{name} {value}" for name, value in settings.items()]
    given = [name for name in os.environ if name.startswith(("NCCL_", "GLOO_")) or name == "OMP_NUM_THREADS"]
    parts += [f"{name} {os.environ[name]} (given)" for name in sorted(given) if name not in settings]
    cards = Path("/sys/class/infiniband")
    fabric = sorted(card.name for card in cards.iterdir()) if cards.is_dir() else []
    if fabric:
        parts.append(f"InfiniBand {', '.join(fabric)}")
    return f"{socket.gethostname()}: {', '.join(parts)}"


def _cores() -> int:
    """CPU cores that this node's processes share: what Slurm gave, or what this process may run on."""
    tasks = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(tasks) if tasks.isdecimal() else len(os.sched_getaffinity(0))
