"""Where the nodes of a job meet: a key-value store on the first of them, made and asked who it is before torch uses it.

torch itself takes whatever listens at the port for that store, waits without a limit where it is none, and lets the
nodes of two jobs that were given one port meet each other.
"""

import errno
import socket
import threading
import time
from concurrent.futures import Future, TimeoutError
from datetime import timedelta

import torch.distributed as dist

from ..runtime.errors import Lost, UserError
from ..runtime.patient_store import PatientStore
from ..runtime.store import serve_store
from .network import LOOPBACK, is_here, reachable
from .torchrun_job import Job

ANSWER_SECONDS = 20.0
"""How long a store that is there may take to answer."""
JOB_KEY = "inrank job"


def meet(job: Job, address: str) -> PatientStore:
    """The store of the job; made here if this is the first node, which keeps it until this process ends.

    Args:
        job: with a place where it meets.
        address: of that place, numeric.

    Raises:
        UserError: another program or another job has the port.
        Lost: nobody is there.
    """
    first = job.node_rank == 0 if job.node_rank is not None else is_here(address)
    store = _make(job, address) if first else None
    if store is None:
        _wait_for(job, address)
        store = _join(job, address)
    asked = PatientStore(store, ANSWER_SECONDS)
    try:
        found = asked.ask(lambda held: held.compare_set(JOB_KEY, "", job.name)).decode()
    except RuntimeError:
        raise Lost(f"the store of the job at {job.place} does not answer; start the same command again") from None
    if found != job.name:
        raise UserError(
            f"port {job.port} of {job.host} is taken by another job; write another port with -m on every node, or, if "
            "it is meant to be this one, the same -N and the same command with all its words on every node"
        )
    return asked


def meet_alone() -> dist.TCPStore:
    """The store of a job of one node, at a port that was free."""
    return serve_store(LOOPBACK, 0, timedelta(seconds=ANSWER_SECONDS))


def _make(job: Job, address: str) -> dist.Store | None:
    """None: somebody listens there already, who may be another node of this job on the same machine."""
    limit = timedelta(seconds=ANSWER_SECONDS)
    try:
        try:
            return serve_store(address, job.port, limit)  # torch's agent, in this process, then shares it
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            # -k 0 behind an address of something else: a mapped port of a container, a service of a cluster.
            print(f"{address} is no address of {socket.gethostname()}: the job's store listens on all of its own")
            return dist.TCPStore(
                address, job.port, is_master=True, wait_for_workers=False, multi_tenant=True, timeout=limit
            )
    except (OSError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" not in str(error) and getattr(error, "errno", None) != errno.EADDRINUSE:
            raise Lost(f"no store can be made at {job.place}: {str(error).splitlines()[0]}") from None
        if job.node_rank is not None or not reachable(address, job.port, 5):
            raise _taken(job) from None
        return None


def _join(job: Job, address: str) -> dist.Store:
    """Connect in a thread: to what is no store torch may talk for ever."""
    made: Future[dist.Store] = Future()

    def connect() -> None:
        try:
            limit = timedelta(seconds=ANSWER_SECONDS)
            made.set_result(dist.TCPStore(address, job.port, is_master=False, wait_for_workers=False, timeout=limit))
        except Exception as error:
            made.set_exception(error)

    threading.Thread(target=connect, name="connect", daemon=True).start()
    try:
        return made.result(ANSWER_SECONDS)
    except (TimeoutError, RuntimeError, ValueError):
        raise _taken(job) from None


def _taken(job: Job) -> UserError:
    return UserError(
        f"port {job.port} of {job.host} is taken by another program; write another port with -m, on every node"
    )


def _wait_for(job: Job, address: str) -> None:
    """Wait until the first node is up; torch itself gives up after a minute, and has no word for it."""
    here = socket.gethostname()
    start = said = time.monotonic()
    while not reachable(address, job.port, 5):
        now = time.monotonic()
        if now - start > job.wait:
            raise Lost(
                f"{here} found nobody at {job.place} within {job.wait} s (-w); start the same command on {job.host} as "
                "well, and see that no firewall is between"
            )
        if now - said > 30 or said == start:
            print(f"{here}: waiting for {job.place} ({now - start:.0f} of {job.wait} s)", flush=True)
            said = now
        time.sleep(0.5)
