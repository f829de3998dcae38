"""Real processes for real faults."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from forked import CONTEXT, set_environment
from pool import place
from torch.distributed import TCPStore

from . import Fault


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status (negative: the signal), and what it wrote."""

    status: int
    output: str


class Job:
    """The command line in ``world_size`` processes.

    Args:
        words: of the command line.
        folder: for what the processes write: ``output-RANK.txt``, and the samples of each step, ``samples-RANK.jsonl``.
        fault: armed in its process.
    """

    def __init__(self, words: Sequence[object], folder: Path, *, world_size: int, fault: Fault | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        # The store listens on a port that the system picks, as torchrun's does.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = []
        for rank in range(world_size):
            environment = os.environ | (place(rank, world_size, self.store.port) if world_size > 1 else {})
            arguments = ([str(word) for word in words], folder, rank, environment, fault)
            process = CONTEXT.Process(target=_run, args=arguments, daemon=True)
            process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 150) -> list[Ended]:
        """How the processes ended; a hang ends them all and fails."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.1))
        hung = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        self.end()
        outputs = [(self.folder / f"output-{rank}.txt").read_text() for rank in range(len(self.processes))]
        assert not hung, f"processes {hung} hung; they wrote: {outputs}"
        return [Ended(int(p.exitcode or 0), output) for p, output in zip(self.processes, outputs, strict=True)]

    def wait_until(self, condition: Callable[[], bool], timeout: float = 150) -> None:
        """Wait for something that the processes do."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, [path.read_text() for path in self.folder.glob("output-*")]
            time.sleep(0.005)

    def end(self) -> None:
        """Kill whatever is left."""
        for process in self.processes:
            process.kill()
            process.join()


def launch(words: Sequence[object], folder: Path, *, world_size: int, fault: Fault | None = None) -> list[Ended]:
    """Run a job to its end."""
    return Job(words, folder, world_size=world_size, fault=fault).wait()


def _run(words: list[str], folder: Path, rank: int, environment: dict[str, str], fault: Fault | None) -> None:
    import torch

    output = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    set_environment(environment)
    torch.set_num_threads(1)
    from inrank_dist.commands.main import main

    from . import arm, record_samples

    record_samples(folder / f"samples-{rank}.jsonl")
    if fault:
        arm(fault)
    raise SystemExit(main(words))
