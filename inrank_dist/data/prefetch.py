"""Prefetches batches in a thread."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

import torch

from .loader import Loader, LoaderState, MicroBatch


class Prefetcher:
    """Returns the batches of a loader and prepares the next ones in a thread. It takes ownership of the loader.

    The thread starts at the first ``next_batch`` and only ever blocks on an empty work queue. So it ends soon after
    ``close``, after this object is garbage-collected, and when the interpreter exits.

    Attributes:
        waited: total seconds that ``next_batch`` has waited.

    Args:
        loader: used by the thread only.
        pin: whether to pin the batches' memory, so that copies to the current CUDA device can be asynchronous.
        depth: number of batches to prefetch.
    """

    def __init__(self, loader: Loader, *, pin: bool, depth: int = 2) -> None:
        self.waited = 0.0
        self._loader, self._pin, self._depth = loader, pin, depth
        self._state = loader.state()
        device = torch.cuda.current_device() if pin else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data", initializer=_set_device, initargs=(device,))
        self._queue: deque[Future[tuple[list[MicroBatch], LoaderState]]] = deque()

    def next_batch(self) -> list[MicroBatch]:
        """Like ``Loader.next_batch``. An error of the loader is raised in its turn, and by every later call."""
        while len(self._queue) <= self._depth:
            # A function, not a method, so that the thread holds no reference to this object.
            self._queue.append(self._thread.submit(_load, self._loader, self._pin))
        if not self._queue[0].done():
            start = time.perf_counter()
            wait([self._queue[0]])
            self.waited += time.perf_counter() - start
        batches, self._state = self._queue[0].result()
        self._queue.popleft()
        return batches

    def state(self) -> LoaderState:
        """Position of the next batch to be returned, regardless of what has been prefetched."""
        return self._state

    def close(self) -> None:
        """Stop the thread after its current batch. May be called twice. No batches can be loaded afterwards."""
        self._thread.shutdown(cancel_futures=True)
        self._queue.clear()


def _set_device(device: int | None) -> None:
    """Threads start on device 0, on which pinning memory could create a CUDA context for every process of the node."""
    if device is not None:
        torch.cuda.set_device(device)


def _load(loader: Loader, pin: bool) -> tuple[list[MicroBatch], LoaderState]:
    """Load the next batch. Returns it with the position of the batch after it."""
    batches = loader.next_batch()
    if pin:
        batches = [
            replace(batch, inputs=batch.inputs.pin_memory(), targets=batch.targets.pin_memory()) for batch in batches
        ]
    return batches, loader.state()
