"""The launcher's key-value store, where it may stop answering: a cut network leaves torch's own waiting for ever."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from typing import Any, TypeVar

import torch.distributed as dist

Answer = TypeVar("Answer")


class StoreSilent(RuntimeError):
    """The store has not answered in time. What was asked of it is still done if it comes back."""


class PatientStore:
    """One thread asks the store, in order and once each, so that whoever wants to know may go on without an answer.

    Args:
        store: a connection that nobody else uses.
        seconds: for which an answer is waited.
    """

    def __init__(self, store: dist.Store, seconds: float) -> None:
        self._store, self._seconds = store, seconds
        self._busy_since: float | None = None
        self._questions: queue.SimpleQueue[tuple[Callable[[dist.Store], Any], Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="store", daemon=True).start()

    def ask(self, question: Callable[[dist.Store], Answer]) -> Answer:
        """Ask something of the store.

        Raises:
            StoreSilent: no answer in time; at once where it has been silent for that long already.
            RuntimeError: the store is gone.
        """
        busy = self._busy_since
        if busy is not None and time.monotonic() - busy > self._seconds:
            raise StoreSilent("the key-value store of the job does not answer")
        answer: Future[Answer] = Future()
        self._questions.put((question, answer))
        try:
            return answer.result(self._seconds)
        except TimeoutError:
            raise StoreSilent(f"the key-value store of the job has not answered for {self._seconds:g} s") from None

    def _run(self) -> None:
        while True:
            question, answer = self._questions.get()
            self._busy_since = time.monotonic()
            try:
                answer.set_result(question(self._store))
            except Exception as error:
                answer.set_exception(error)
            self._busy_since = None
