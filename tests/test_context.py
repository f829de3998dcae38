"""How the processes of a job find each other."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from cluster_tools import free_port, listens_beyond_loopback

from inrank_dist.runtime.context import name_attempt
from inrank_dist.runtime.store import join_store, serve_store
from inrank_dist.runtime.store_client import StoreClient, StoreTimeout


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


@pytest.mark.serial
def test_a_store_that_falls_silent_and_comes_back() -> None:
    """As when the network is cut: whoever asks goes on without an answer, and nothing that was asked is lost."""
    silent, back = threading.Event(), threading.Event()

    class Slow(dist.HashStore):  # type: ignore[misc]
        def add(self, key: str, amount: int) -> int:
            if silent.is_set():
                back.wait(60)
                silent.clear()
            return int(super().add(key, amount))

    store = StoreClient(Slow(), seconds=1.0)
    assert store.call(lambda held: held.add("met", 1)) == 1
    silent.set()
    with pytest.raises(StoreTimeout):
        store.call(lambda held: held.add("met", 1))
    time.sleep(0.1)
    began = time.monotonic()
    with pytest.raises(StoreTimeout):  # at once: it has been silent for long enough
        store.call(lambda held: held.add("met", 1))
    assert time.monotonic() - began < 0.9
    back.set()
    while silent.is_set():
        time.sleep(0.02)
    time.sleep(0.1)
    assert store.call(lambda held: held.add("met", 0)) == 2  # the one that was asked; the last never was


def test_a_store_listens_where_it_is_used_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own listens on all interfaces, and takes whatever comes. torch's agent shares one that is there."""
    limit, there = timedelta(seconds=20), set(listens_beyond_loopback(os.getpid()))
    store = serve_store("127.0.0.1", 0, limit)
    shared = dist.TCPStore("127.0.0.1", store.port, 1, True, limit, multi_tenant=True)
    shared.set("who", "agent")
    assert store.get("who") == b"agent"
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    kept = join_store(0, limit)
    join_store(1, limit).set("who", "process 1")
    assert kept.get("who") == b"process 1"
    assert set(listens_beyond_loopback(os.getpid())) == there
    with pytest.raises(dist.DistNetworkError, match="Address already in use"):
        join_store(0, limit)


def test_an_agent_that_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its store was there before the process was started; torch would try again for the whole of the time."""
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(dist.DistNetworkError, match="Connection refused"):
        join_store(1, timedelta(hours=1))
