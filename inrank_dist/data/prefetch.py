"""Batches made ahead of the training, in a thread of their own."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

import torch

from .loader import Loader, LoaderState, MicroBatch


class Prefetcher:
    """Gives the batches of a loader, which from now on is its own, and makes the next ones meanwhile.

    The thread starts at the first ``next_batch`` and never waits for the training, only for work. So it ends soon
    after ``close``, after the last reference to this object is gone, and when the interpreter exits.

    Attributes:
        waited: seconds that ``next_batch`` has waited in all.

    Args:
        loader: read by the thread alone.
        pin: put the batches in page-locked memory, from which copies to the current CUDA device need not be waited for.
        depth: how many batches are made ahead.
    """

    def __init__(self, loader: Loader, *, pin: bool, depth: int = 2) -> None:
        self.waited = 0.0
        self._loader, self._pin, self._depth = loader, pin, depth
        self._state = loader.state()
        device = torch.cuda.current_device() if pin else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data", initializer=_enter, initargs=(device,))
        self._ahead: deque[Future[tuple[list[MicroBatch], LoaderState]]] = deque()

    def next_batch(self) -> list[MicroBatch]:
        """As ``Loader.next_batch``. What the loader raises is raised here when its turn comes, and again ever after."""
        while len(self._ahead) <= self._depth:
            # Not a method: the thread must not keep this object.
            self._ahead.append(self._thread.submit(_make, self._loader, self._pin))
        if not self._ahead[0].done():
            began = time.perf_counter()
            wait([self._ahead[0]])
            self.waited += time.perf_counter() - began
        batches, self._state = self._ahead[0].result()
        self._ahead.popleft()
        return batches

    def state(self) -> LoaderState:
        """Where the next batch that is handed out begins, whatever has been made ahead."""
        return self._state

    def close(self) -> None:
        """End the thread, after the batch that is under way; closing twice is fine. There are no more batches."""
        self._thread.shutdown(cancel_futures=True)
        self._ahead.clear()


def _enter(device: int | None) -> None:
    """Threads start on device 0, where pinning memory could make a context for every process of the machine."""
    if device is not None:
        torch.cuda.set_device(device)


def _make(loader: Loader, pin: bool) -> tuple[list[MicroBatch], LoaderState]:
    """The next batch, and where the one after it begins."""
    batches = loader.next_batch()
    if pin:
        batches = [
            replace(batch, inputs=batch.inputs.pin_memory(), targets=batch.targets.pin_memory()) for batch in batches
        ]
    return batches, loader.state()
