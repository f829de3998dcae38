"""A client of a job's key-value store with timeouts. torch's own client waits forever when the network is cut."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


class StoreTimeout(RuntimeError):
    """The store has not answered in time. The pending call still completes if the store comes back."""


class StoreClient:
    """Makes all calls to a store in one thread, in order and once each, so that the caller can time out.

    Args:
        store: a connection that nothing else uses.
        seconds: timeout of each call.
    """

    def __init__(self, store: dist.Store, seconds: float) -> None:
        self._store, self._seconds = store, seconds
        self._busy_since: float | None = None
        self._calls: queue.SimpleQueue[tuple[Callable[[dist.Store], Any], Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="store", daemon=True).start()

    def call(self, function: Callable[[dist.Store], Result]) -> Result:
        """Call a function with the store.

        Raises:
            StoreTimeout: no answer in time. Raised at once if an earlier call has been pending for that long.
            RuntimeError: the store is gone.
        """
        busy_since = self._busy_since
        if busy_since is not None and time.monotonic() - busy_since > self._seconds:
            raise StoreTimeout("the key-value store of the job does not answer")
        result: Future[Result] = Future()
        self._calls.put((function, result))
        try:
            return result.result(self._seconds)
        except TimeoutError:
            raise StoreTimeout(f"the key-value store of the job has not answered for {self._seconds:g} s") from None

    def _run(self) -> None:
        while True:
            function, result = self._calls.get()
            self._busy_since = time.monotonic()
            try:
                result.set_result(function(self._store))
            except Exception as error:
                result.set_exception(error)
            self._busy_since = None
