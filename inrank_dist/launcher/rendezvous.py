"""The rendezvous of a job's nodes: a key-value store on the first node, created and verified before torch uses it.

By itself torch takes whatever listens at the port for its store, waits without a timeout if it is something else, and
lets the nodes of two jobs with the same port join each other.
"""

import errno
import socket
import threading
import time
from concurrent.futures import Future, TimeoutError
from datetime import timedelta

import torch.distributed as dist

from ..runtime.errors import JobFailed, UserError
from ..runtime.store import serve_store
from ..runtime.store_client import StoreClient
from .network import LOOPBACK, is_local_address, reachable
from .torchrun_job import Job

ANSWER_SECONDS = 20.0
"""How long a running store may take to answer."""
JOB_KEY = "inrank job"


def join(job: Job, address: str) -> StoreClient:
    """Connect to the job's store. The first node creates it and keeps it until this process exits.

    Args:
        job: a job with an endpoint.
        address: of the endpoint's host, numeric.

    Raises:
        UserError: the port belongs to another program or another job.
        JobFailed: the first node cannot be reached.
    """
    first = job.node_rank == 0 if job.node_rank is not None else is_local_address(address)
    store = _serve(job, address) if first else None
    if store is None:
        _wait_until_reachable(job, address)
        store = _connect(job, address)
    client = StoreClient(store, ANSWER_SECONDS)
    try:
        found = client.call(lambda s: s.compare_set(JOB_KEY, "", job.name)).decode()
    except RuntimeError:
        raise JobFailed(
            f"the store of the job at {job.endpoint} does not answer; start the same command again"
        ) from None
    if found != job.name:
        raise UserError(
            f"port {job.port} of {job.host} is taken by another job; write another port with -m on every node, or, if "
            "the nodes belong to one job, the same -N and the same command with the same arguments on every node"
        )
    return client


def single_node_store() -> dist.TCPStore:
    """The store of a job with one node, at a free port."""
    return serve_store(LOOPBACK, 0, timedelta(seconds=ANSWER_SECONDS))


def _serve(job: Job, address: str) -> dist.Store | None:
    """Create the store; None if something listens there already, perhaps another node of this job on this machine."""
    limit = timedelta(seconds=ANSWER_SECONDS)
    try:
        try:
            return serve_store(address, job.port, limit)  # torch's agent, in this process, shares it
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            # With -k 0 the endpoint may be a mapped port of a container or a cluster service.
            print(
                f"{address} is not an address of {socket.gethostname()}: the job's store listens on all its addresses"
            )
            return dist.TCPStore(
                address, job.port, is_master=True, wait_for_workers=False, multi_tenant=True, timeout=limit
            )
    except (OSError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" not in str(error) and getattr(error, "errno", None) != errno.EADDRINUSE:
            raise JobFailed(f"the store cannot be created at {job.endpoint}: {str(error).splitlines()[0]}") from None
        if job.node_rank is not None or not reachable(address, job.port, 5):
            raise _port_taken(job) from None
        return None


def _connect(job: Job, address: str) -> dist.Store:
    """Connect in a thread, because torch may wait forever for something that is not a store."""
    connected: Future[dist.Store] = Future()

    def connect() -> None:
        try:
            limit = timedelta(seconds=ANSWER_SECONDS)
            store = dist.TCPStore(address, job.port, is_master=False, wait_for_workers=False, timeout=limit)
            connected.set_result(store)
        except Exception as error:
            connected.set_exception(error)

    threading.Thread(target=connect, name="connect", daemon=True).start()
    try:
        return connected.result(ANSWER_SECONDS)
    except (TimeoutError, RuntimeError, ValueError):
        raise _port_taken(job) from None


def _port_taken(job: Job) -> UserError:
    return UserError(
        f"port {job.port} of {job.host} is taken by another program; write another port with -m, on every node"
    )


def _wait_until_reachable(job: Job, address: str) -> None:
    """Wait until the first node is up, and log it; torch gives up after a minute and logs nothing."""
    here = socket.gethostname()
    start = logged = time.monotonic()
    while not reachable(address, job.port, 5):
        now = time.monotonic()
        if now - start > job.wait:
            raise JobFailed(
                f"{here} found nobody at {job.endpoint} within {job.wait} s (-w); start the same command on {job.host} "
                "as well, and check that no firewall blocks the port"
            )
        if now - logged > 30 or logged == start:
            print(f"{here}: waiting for {job.endpoint} ({now - start:.0f} of {job.wait} s)", flush=True)
            logged = now
        time.sleep(0.5)
