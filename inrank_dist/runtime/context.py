"""The distributed context of a process: its rank, its device and the collectives that all processes take part in."""

import gc
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import agree
from .environment import integer_variable, read_environment
from .errors import JobFailed, UserError
from .progress import phase
from .store import join_store

Result = TypeVar("Result")

JOIN_PATIENCE_S = 10.0
"""Seconds that the start of the processes of a job may take before this is shown."""


class Context:
    """Rank, world size and device of this process, from the launcher's environment.

    Attributes:
        rank, world_size, local_rank: as set by torchrun and compatible launchers; 0, 1, 0 without a launcher.
        device: ``cuda:LOCAL_RANK`` if there is a GPU, else ``cpu``.
        attempt: identifier of this attempt of the job, shared by its processes and not used by earlier attempts. Set by
            ``start``.
    """

    def __init__(self) -> None:
        environment = read_environment()
        self.rank, self.world_size = environment.rank, environment.world_size
        self.local_rank = environment.local_rank
        if torch.cuda.is_available():
            # Check the number of processes on the node, so that all of them fail and none waits for the others.
            local_world_size = max(integer_variable("LOCAL_WORLD_SIZE", 0), self.local_rank + 1)
            if local_world_size > torch.cuda.device_count():
                raise UserError(
                    f"{local_world_size} processes were started on this node, which has {torch.cuda.device_count()} "
                    f"GPU(s); start at most {torch.cuda.device_count()} processes per node"
                )
            self.device = torch.device("cuda", self.local_rank)
        else:
            self.device = torch.device("cpu")
        self.attempt = ""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the logs."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether the process group is initialized."""
        return dist.is_initialized()

    def start(self, timeout_seconds: int, *, always: bool = False) -> None:
        """Initialize the process group: NCCL on GPUs, gloo on CPU. A single process does so only if ``always``.

        Raises:
            UserError: the other processes were not started.
            JobFailed: torchrun started the other processes, but they did not join.
        """
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if (self.world_size == 1 and not always) or dist.is_initialized():
            return
        # Enable torch's flight recorder, which records this process's collectives for the dump after a hang.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        timeout = timedelta(seconds=timeout_seconds)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        if self.world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
            return
        try:
            with phase("waiting for the other processes", enabled=self.is_main, patience=JOIN_PATIENCE_S):
                store = join_store(self.rank, timeout)
                self.attempt = name_attempt(store, self.rank, self.world_size, timeout_seconds)
                store = dist.PrefixStore(self.attempt, store)
                dist.init_process_group(
                    backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout
                )
        except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
            endpoint = f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}"
            line = (
                f"process {self.rank} of {self.world_size} did not find the others at {endpoint} within "
                f"{timeout_seconds} s ({str(error).splitlines()[0]})"
            )
            if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started WORLD_SIZE processes
                raise JobFailed(f"{line}; start the job again") from None
            raise UserError(f"{line}; start all processes with torchrun") from None

    def stop(self) -> None:
        """Destroy the process group, if there is one. Delete everything that uses it first."""
        if dist.is_initialized():
            # DDP's reducer keeps the group alive. Freed after the group is destroyed, it can deadlock.
            gc.collect()
            deepspeed = sys.modules.get("deepspeed.comm")  # has groups of its own, which it must release
            if deepspeed is not None and deepspeed.is_initialized():
                deepspeed.destroy_process_group()
            else:
                dist.destroy_process_group()

    def sum(self, tensor: Tensor) -> None:
        """All-reduce (sum) a tensor in place."""
        if dist.is_initialized():
            dist.all_reduce(tensor)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite a tensor on the CPU with that of process ``source``."""
        if dist.is_initialized():
            dist.broadcast(tensor, source)

    def barrier(self) -> None:
        """Wait for all processes."""
        if dist.is_initialized():
            dist.barrier(device_ids=[self.local_rank] if self.device.type == "cuda" else None)

    def on_rank_zero(self, work: Callable[..., Result], *arguments: object) -> Result | None:
        """Run ``work`` on process 0. If it fails, every process raises the same error.

        Returns:
            What ``work`` returned, on process 0; None on the others.
        """
        result = None
        failure: list[BaseException | None] = [None]
        if self.is_main:
            try:
                result = work(*arguments)
            except Exception as error:
                failure = [error]
        if dist.is_initialized():
            dist.broadcast_object_list(failure, src=0, device=torch.device("cpu"))
        if failure[0] is not None:
            raise failure[0]
        return result

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """All-gather a small, picklable value. Returns the values by rank."""
        if not dist.is_initialized():
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=group)
        return values

    def on_all_ranks(self, work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
        """Run ``work`` on every process. If it raises ``UserError`` on some, all processes raise the first one's.

        Returns:
            What ``work`` returned in this process.
        """
        result, mistake = None, None
        try:
            result = work()
        except UserError as error:
            mistake = error
        for each in self.gather(mistake, group):
            if each is not None:
                raise each
        return cast(Result, result)

    def agree(self, what: str, answers: Mapping[str, object]) -> None:
        """Check that all processes hold the same answers, see ``agreement.agree``."""
        agree(what, answers, self.device)


def name_attempt(store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """Agree on an identifier for this attempt of the job that no earlier attempt has used.

    torchrun keeps one store over all attempts. Its restart count differs between nodes, because a node whose own
    processes did not fail does not count. So a process might read what an earlier attempt wrote to the store, and wait
    for processes that are gone. Therefore each process writes a fresh token, and process 0 answers that token with the
    identifier.

    Raises:
        dist.DistStoreError: not all processes joined within ``timeout_seconds``.
    """
    if rank > 0:
        token = uuid.uuid4().hex
        store.set(f"inrank token of {rank}", token)
        name = str(store.get(f"inrank name for {token}").decode())
        store.add(f"{name} known", 1)
        return name
    name, answered, deadline = uuid.uuid4().hex, set(), time.monotonic() + timeout_seconds
    while store.add(f"{name} known", 0) < world_size - 1:
        for other in range(1, world_size):
            key = f"inrank token of {other}"  # may still be an earlier attempt's, and will then change
            if store.check([key]) and (token := store.get(key).decode()) not in answered:
                store.set(f"inrank name for {token}", name)
                answered.add(token)
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"only {store.add(f'{name} known', 0) + 1} of {world_size} processes came")
        time.sleep(0.01)
    return name
