"""Where this process stands among the others, and what they do together."""

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
from .errors import Lost, UserError
from .place import read_place, whole_number
from .store import join_store

Result = TypeVar("Result")


class Context:
    """Rank, world size and device of this process, from the launcher's environment.

    Attributes:
        rank, world_size, local_rank: as set by torchrun and its kin; 0, 1, 0 without a launcher.
        device: ``cuda:LOCAL_RANK`` where there is a GPU, else ``cpu``.
        attempt: a name that the processes of this attempt of the job share and no attempt before had; set by ``start``.
    """

    def __init__(self) -> None:
        place = read_place()
        self.rank, self.world_size, self.local_rank = place.rank, place.world_size, place.local_rank
        if torch.cuda.is_available():
            # By the number of processes of the node, so that all of them see the mistake and none waits for the others.
            here = whole_number("LOCAL_WORLD_SIZE", self.local_rank + 1)
            if max(here, self.local_rank + 1) > torch.cuda.device_count():
                raise UserError(
                    f"{here} processes were started on this node, which has {torch.cuda.device_count()} GPU(s); "
                    f"start at most {torch.cuda.device_count()} processes per node"
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
        """Whether the process group is up."""
        return dist.is_initialized()

    def start(self, timeout_seconds: int, *, always: bool = False) -> None:
        """Join the process group: NCCL on GPUs, gloo on CPU. One process needs none unless ``always``.

        Raises:
            UserError: the other processes are not there.
            Lost: torchrun has started them, but they do not come.
        """
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if (self.world_size == 1 and not always) or dist.is_initialized():
            return
        # torch's flight recorder: which collectives this process has entered, for the dump when one hangs.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        timeout = timedelta(seconds=timeout_seconds)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        if self.world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
            return
        try:
            store = join_store(self.rank, timeout)
            self.attempt = name_attempt(store, self.rank, self.world_size, timeout_seconds)
            store = dist.PrefixStore(self.attempt, store)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout)
        except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
            place = f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}"
            line = (
                f"process {self.rank} of {self.world_size} did not find the others at {place} within "
                f"{timeout_seconds} s ({str(error).splitlines()[0]})"
            )
            if "TORCHELASTIC_RUN_ID" in os.environ:  # as many were started as WORLD_SIZE says
                raise Lost(f"{line}; start the job again") from None
            raise UserError(f"{line}; start all processes with torchrun") from None

    def stop(self) -> None:
        """Leave the process group, if there is one. Everything that uses it must be dropped before."""
        if dist.is_initialized():
            # DDP's reducer keeps the group alive; freed after the group is destroyed, it can wait for itself forever.
            gc.collect()
            deepspeed = sys.modules.get("deepspeed.comm")  # which keeps groups of its own, and must forget them
            if deepspeed is not None and deepspeed.is_initialized():
                deepspeed.destroy_process_group()
            else:
                dist.destroy_process_group()

    def sum(self, tensor: Tensor) -> None:
        """Sum a tensor in place over all processes."""
        if dist.is_initialized():
            dist.all_reduce(tensor)

    def barrier(self) -> None:
        """Wait for all processes."""
        if dist.is_initialized():
            dist.barrier(device_ids=[self.local_rank] if self.device.type == "cuda" else None)

    def on_rank_zero(self, work: Callable[..., Result], *arguments: object) -> Result | None:
        """Process 0 does something that may fail; if it fails, every process raises the same error.

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
        """The values of all processes, by rank; small, picklable ones."""
        if not dist.is_initialized():
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=group)
        return values

    def on_all_ranks(self, work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
        """Every process does something in which the user's mistake may show in some; all then raise the first one's.

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
        """Check that all processes hold the same answers, as ``agreement.agree``."""
        agree(what, answers, self.device)


def name_attempt(store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """A name that the processes of this attempt of a job share and no attempt before had.

    torchrun keeps one store over all attempts, and its count of restarts differs between nodes (a node whose own
    processes are sound does not count), so a process may read there what its predecessors wrote and wait for the dead.
    Therefore each shows a word that it has just made up, and process 0 answers that word with the name.

    Raises:
        dist.DistStoreError: the others did not come within ``timeout_seconds``.
    """
    if rank > 0:
        word = uuid.uuid4().hex
        store.set(f"inrank word of {rank}", word)
        name = str(store.get(f"inrank name for {word}").decode())
        store.add(f"{name} known", 1)
        return name
    name, answered, until = uuid.uuid4().hex, set(), time.monotonic() + timeout_seconds
    while store.add(f"{name} known", 0) < world_size - 1:
        for other in range(1, world_size):
            key = f"inrank word of {other}"  # perhaps still a predecessor's; then it changes
            if store.check([key]) and (word := store.get(key).decode()) not in answered:
                store.set(f"inrank name for {word}", name)
                answered.add(word)
        if time.monotonic() > until:
            raise dist.DistStoreError(f"only {store.add(f'{name} known', 0) + 1} of {world_size} processes came")
        time.sleep(0.01)
    return name
