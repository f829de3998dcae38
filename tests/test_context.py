"""How the processes of a job find each other."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from inrank_dist.engine.context import name_attempt
from inrank_dist.engine.patient_store import PatientStore, StoreSilent


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


def test_a_store_that_falls_silent_and_comes_back() -> None:
    """As when the network is cut: whoever asks goes on without an answer, and nothing that was asked is lost."""
    silent = threading.Event()

    class Slow(dist.HashStore):  # type: ignore[misc]
        def add(self, key: str, amount: int) -> int:
            if silent.is_set():
                time.sleep(0.4)
                silent.clear()
            return int(super().add(key, amount))

    store = PatientStore(Slow(), seconds=0.1)
    assert store.ask(lambda held: held.add("met", 1)) == 1
    silent.set()
    with pytest.raises(StoreSilent):
        store.ask(lambda held: held.add("met", 1))
    began = time.monotonic()
    with pytest.raises(StoreSilent):  # at once: it has been silent for long enough
        store.ask(lambda held: held.add("met", 1))
    assert time.monotonic() - began < 0.1
    while silent.is_set():
        time.sleep(0.02)
    time.sleep(0.1)
    assert store.ask(lambda held: held.add("met", 0)) == 2  # the one that was asked; the last never was
