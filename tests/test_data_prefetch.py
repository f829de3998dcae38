"""Batches made ahead are those of the loader, in its order, and nobody can tell from the state that they were made."""

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small_config, train
from test_data_loader import ids, loader

from inrank_dist.data import prefetch
from inrank_dist.data.loader import LoaderState, MicroBatch
from inrank_dist.data.prefetch import Prefetcher
from inrank_dist.train import clock
from inrank_dist.train.loop import Trainer

SECONDS = 30
"""Longest wait for what must come."""


class Fake:
    """A loader whose batch k has sample id k; ``before(k)`` is called in the thread before it is made."""

    def __init__(self, before: Callable[[int], object] = lambda k: None) -> None:
        self.before, self.made, self.threads = before, 0, set[threading.Thread]()
        self.changed = threading.Condition()

    def next_batch(self) -> list[MicroBatch]:
        self.threads.add(threading.current_thread())
        self.before(self.made)
        batch = MicroBatch(torch.full((1, 2), self.made), torch.full((1, 2), self.made + 1), [self.made])
        with self.changed:
            self.made += 1
            self.changed.notify_all()
        return [batch]

    def state(self) -> LoaderState:
        return LoaderState(0, 0, self.made, "f")

    def wait_for(self, made: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.made >= made, SECONDS)


@pytest.fixture
def over() -> Iterator[Callable[..., Prefetcher]]:
    """Makes prefetchers and closes them in the end."""
    made: list[Prefetcher] = []

    def make(source: Any, **options: Any) -> Prefetcher:
        made.append(Prefetcher(source, **{"pin": False, **options}))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_batches_and_states_are_those_of_the_loader(over: Callable[..., Prefetcher], depth: int) -> None:
    """A checkpoint between any two batches must name the second, not what is made ahead of it: over two epochs."""
    plain, ahead = loader(micro_batch_size=3), over(loader(micro_batch_size=3), depth=depth)
    for _ in range(4):
        assert ahead.state() == plain.state()
        for ours, theirs in zip(ahead.next_batch(), plain.next_batch(), strict=True):
            assert torch.equal(ours.inputs, theirs.inputs) and torch.equal(ours.targets, theirs.targets)
            assert ours.sample_ids == theirs.sample_ids
    state = ahead.state()
    assert ids(over(loader(micro_batch_size=3, state=state)).next_batch()) == ids(plain.next_batch())


def test_batches_are_made_while_the_caller_is_busy(over: Callable[..., Prefetcher]) -> None:
    """Two, and no more: memory must not fill with what a slow training has not asked for."""
    source = Fake()
    ahead = over(source)
    for step in range(5):
        assert ids(ahead.next_batch()) == [step]
        source.wait_for(step + 3)  # this thread asks for nothing meanwhile
        assert source.made == step + 3
        assert ahead.state().sample_index == step + 1


def test_nothing_is_read_before_the_first_batch_is_asked_for(over: Callable[..., Prefetcher]) -> None:
    source = Fake()
    assert over(source).state().sample_index == 0
    assert source.made == 0 and not source.threads


def test_one_thread_reads_and_it_is_not_the_callers(over: Callable[..., Prefetcher]) -> None:
    source = Fake()
    ahead = over(source)
    for _ in range(4):
        ahead.next_batch()
    assert len(source.threads) == 1 and threading.current_thread() not in source.threads


def test_what_the_loader_raises_is_raised_in_its_turn_and_again(over: Callable[..., Prefetcher]) -> None:
    """Batches before it are good, those after it must not be trained on, and the state stays where it was."""
    failures = [2]

    def fail(k: int) -> None:
        if k in failures:
            failures.remove(k)  # the next attempt would be fine
            raise OSError("the disk is gone")

    ahead = over(Fake(fail))
    assert [ids(ahead.next_batch()) for _ in range(2)] == [[0], [1]]
    for _ in range(3):
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.next_batch()
        assert ahead.state().sample_index == 2


def test_waited_is_the_time_in_which_no_batch_was_ready(
    over: Callable[..., Prefetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader takes 5 s of this clock for batches 0 and 3, from when the caller begins to wait for them."""
    slow = {0: threading.Event(), 3: threading.Event()}

    class Clock:
        now, step = 0.0, 0

        def perf_counter(self) -> float:
            if self.step in slow:
                slow[self.step].set()
            return self.now

    def before(k: int) -> None:
        if k in slow:
            assert slow[k].wait(SECONDS)
            clock.now += 5

    clock, ahead, waited = Clock(), over(Fake(before)), []
    monkeypatch.setattr(prefetch, "time", clock)
    for clock.step in range(6):
        ahead.next_batch()
        waited.append(ahead.waited)
    assert waited == [5, 5, 5, 10, 10, 10]


def test_closing_ends_the_thread_also_twice_and_unused() -> None:
    source = Fake()
    ahead = Prefetcher(source, pin=False)  # type: ignore[arg-type]
    ahead.next_batch()
    ahead.close()
    ahead.close()
    assert not any(thread.is_alive() for thread in source.threads)
    assert ahead.state().sample_index == 1
    with pytest.raises(RuntimeError):
        ahead.next_batch()
    Prefetcher(source, pin=False).close()  # type: ignore[arg-type]


def test_one_that_is_dropped_keeps_neither_thread_nor_data() -> None:
    """A failed start may leave one behind in a process that goes on."""
    source = Fake()
    ahead = Prefetcher(source, pin=False)  # type: ignore[arg-type]
    batch = ahead.next_batch()
    (thread,) = source.threads
    data, tensor = weakref.ref(source), weakref.ref(batch[0].inputs)
    del ahead, source, batch
    gc.collect()
    thread.join(SECONDS)
    assert not thread.is_alive()
    gc.collect()
    assert data() is None and tensor() is None


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_ends_its_thread_however_it_ends(corpus: Path, tmp_path: Path, fails: bool) -> None:
    """And its log tells the share of the time that was spent waiting."""

    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("data")} - before

    before: set[threading.Thread] = set()
    before, seen = threads(), list[set[threading.Thread]]()

    def hook(trainer: Trainer) -> None:
        after_step = trainer.ranks.after_step

        def observed(step: int, *rest: Any) -> Any:
            seen.append(threads())
            if fails:
                raise RuntimeError("in the midst of the run")
            return after_step(step, *rest)

        trainer.ranks.after_step = observed  # type: ignore[method-assign]

    config = small_config(corpus, run__dir=tmp_path, train__steps=3, lowrank__mode="full")
    with pytest.raises(RuntimeError, match="in the midst") if fails else nullcontext():
        recorder, _ = train(config, hook=hook)
        shares = [record["data_wait"] for record in recorder.records if record["kind"] == "step"]
        assert len(shares) == 3 and all(0 <= share <= 1 for share in shares)
    assert len(seen) == (1 if fails else 3) and all(len(each) == 1 for each in seen)
    assert not threads()


def test_the_share_is_that_of_the_training_time_since_the_last_record(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now)
    measured = clock.Clock(seconds=500.0, tokens=70)  # of a resumed run
    now += 10
    assert measured.rates(100, 2.5, 400) == [3.0, 0.25, 40.0]
    with measured.stopped():
        now += 90
    now += 5
    assert measured.rates(110, 3.0, 500) == [2.0, 0.1, 20.0]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "os._exit(0)"])
def test_an_open_one_does_not_hold_up_the_exit(ending: str) -> None:
    program = (
        f"import os; from test_data_prefetch import *; p = Prefetcher(Fake(), pin=False); p.next_batch(); {ending}"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


def test_memory_is_pinned_where_asked_for(over: Callable[..., Prefetcher], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the thread, which works on the caller's device."""
    pinned: list[tuple[threading.Thread, torch.Tensor]] = []
    devices: list[tuple[threading.Thread, int]] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append((threading.current_thread(), tensor.clone()))
        return pinned[-1][1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append((threading.current_thread(), device)))
    over(Fake()).next_batch()
    assert not pinned and not devices
    source = Fake()
    (batch,) = over(source, pin=True).next_batch()
    assert batch.inputs is pinned[0][1] and batch.targets is pinned[1][1]
    assert batch.inputs.tolist() == [[0, 0]] and batch.targets.tolist() == [[1, 1]] and batch.sample_ids == [0]
    (thread,) = source.threads
    assert devices == [(thread, 3)] and {each for each, _ in pinned} == {thread}
