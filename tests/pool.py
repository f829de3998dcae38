"""A pool of worker processes for real process groups; starting them once saves most of the time of the tests."""

import faulthandler
import gc
import importlib
import os
import sys
import time
import traceback
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from forked import CONTEXT, set_environment
from torch.distributed import TCPStore


class Pool:
    """Runs a function in ``world_size`` processes at once, each with the environment that torchrun would give it."""

    def __init__(self) -> None:
        self.workers: list[tuple[BaseProcess, Connection]] = []

    def run(self, function: str, *arguments: Any, world_size: int, timeout: float = 200) -> list[Any]:
        """Call ``module:name`` with the arguments in each process; return what each returned, by rank.

        A failure or a hang in any process ends all of them and fails the test.
        """
        while len(self.workers) < world_size:
            self._start()
        # The store listens on a port that the system picks, as torchrun's does.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, (_, pipe) in enumerate(self.workers[:world_size]):
            pipe.send((function, arguments, timeout, os.environ | place(rank, world_size, store.port)))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(self.workers[:world_size])}
        while len(results) < world_size:
            ready = wait([pipe for pipe, rank in pipes.items() if rank not in results], deadline - time.monotonic())
            if not ready:
                self.close()
                missing = sorted(set(range(world_size)) - set(results))
                raise TimeoutError(f"{function} hung: no answer from processes {missing} in {timeout} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    error, results[pipes[pipe]] = pipe.recv()
                except EOFError:
                    error = "the process died"
                if error:
                    self.close()
                    raise AssertionError(f"process {pipes[pipe]}: {error}")
        return [results[rank] for rank in range(world_size)]

    def _start(self) -> None:
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self.workers.append((process, ours))

    def close(self) -> None:
        """End all processes."""
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
        self.workers.clear()


def place(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would tell a process of its place; the store listens on ``port``."""
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    return {name: str(value) for name, value in environment.items()}


def _forget_deepspeed() -> None:
    """Undo what ZeRO-3 leaves behind in a process. It numbers modules and compares the numbers, and it replaces torch's
    linear function, which changes the order of gradients: workers that have lived different lives would disagree,
    without a word where ZeRO-2 puts gradients in buckets as they come."""
    if "deepspeed" in sys.modules:
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.runtime.zero.partition_parameters import Init

        Init.param_id = 0
        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
        torch.nn.functional.linear = getattr(Init, "linear_bk", torch.nn.functional.linear)


def _work(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, arguments, timeout, environment = pipe.recv()
        except (EOFError, OSError):
            return
        set_environment(environment)
        _forget_deepspeed()
        module, _, name = function.partition(":")
        importlib.import_module(module)
        gc.collect()
        gc.freeze()  # as the train command does: else each rank event searches all that was imported for cycles
        faulthandler.dump_traceback_later(timeout - 5, exit=False)  # a hang says where
        try:
            pipe.send((None, getattr(importlib.import_module(module), name)(*arguments)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        finally:
            faulthandler.cancel_dump_traceback_later()
