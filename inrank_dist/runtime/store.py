"""Creates and joins torch's key-value store, which has no authentication, on as few network addresses as possible."""

import errno
import ipaddress
import logging
import os
import socket
from datetime import timedelta

import torch.distributed as dist

from .environment import integer_variable

log = logging.getLogger("inrank_dist")

AGENT_SECONDS = 60.0
"""Timeout for connecting to a store that was running before this process started."""


def serve_store(address: str, port: int, timeout: timedelta) -> dist.TCPStore:
    """Create a store that listens on a single address of this machine. torch's own listens on all of them.

    Other stores that this process creates at the same port share it (``multi_tenant``).

    Args:
        address: numeric.
        port: 0 selects a free one.

    Raises:
        OSError: this machine does not have the address, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(socket.getaddrinfo(address, port, family, socket.SOCK_STREAM)[0][4])
        port = listener.getsockname()[1]
        return dist.TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,
            timeout=timeout,
            master_listen_fd=listener.detach(),
        )


def join_store(rank: int, timeout: timedelta) -> dist.Store:
    """Connect to the store at ``MASTER_ADDR`` and ``MASTER_PORT``. torchrun's agent runs it; otherwise process 0 starts
    it here.

    Raises:
        dist.DistNetworkError, dist.DistStoreError, ValueError: the store cannot be reached.
    """
    host, port = os.environ["MASTER_ADDR"], integer_variable("MASTER_PORT", 0)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == 0 and not agent:
        try:
            address = _address_to_serve(host)
            if address is not None:
                return serve_store(address, port, timeout)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise dist.DistNetworkError(f"{host}:{port}: {error.strerror}") from None
        log.info("the key-value store of the job listens on all interfaces: %s is not an address of this machine", host)
        return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, multi_tenant=True, timeout=timeout)
    limit = timeout
    if agent:  # the agent's store is already running; if it is gone, so is the agent, which would end this process
        limit = min(timeout, timedelta(seconds=AGENT_SECONDS))
        try:
            socket.create_connection((host, port), AGENT_SECONDS).close()
        except OSError as error:
            raise dist.DistNetworkError(f"{host}:{port}: {error.strerror or error}") from None
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
    store.set_timeout(timeout)
    return store


def _address_to_serve(host: str) -> str | None:
    """The address at which other processes look for ``host``; None if it is not an address of this machine.

    Many systems resolve their own name to 127.0.1.1, which other machines do not.
    """
    addresses = [str(each[4][0]) for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    one_machine = integer_variable("LOCAL_WORLD_SIZE", 0) == integer_variable("WORLD_SIZE", 1)
    if one_machine or host == "localhost" or host in addresses:
        return addresses[0]
    routable = [each for each in addresses if not ipaddress.ip_address(each.partition("%")[0]).is_loopback]
    return routable[0] if routable else None
