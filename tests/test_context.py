"""How the processes of a job find each other."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from inrank_dist.engine.context import name_attempt


def attempt(port: int, world_size: int, late: int) -> list[str]:
    """The names that the processes of one attempt find in a store; one of them comes late."""

    def process(rank: int) -> str:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        time.sleep(0.2 if rank == late else 0)
        return name_attempt(store, rank, world_size, 20)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(process, range(world_size)))


def test_an_attempt_does_not_mistake_what_the_one_before_wrote_for_its_own() -> None:
    """torchrun keeps one store over its restarts, and some processes of the next attempt are there before others."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = [attempt(store.port, 3, late) for late in (0, 1, 2, 0)]
    assert [len(set(each)) for each in names] == [1] * 4
    assert len({each[0] for each in names}) == 4


def test_processes_that_do_not_come_are_missed() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(dist.DistStoreError, match="only 1 of 2 processes came"):
        name_attempt(store, 0, 2, 0.1)
