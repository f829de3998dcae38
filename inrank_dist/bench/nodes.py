"""Do all nodes answer, and is one of them slow? Seconds, before hours are spent on a job that waits for the slowest.

Every process multiplies a matrix, all of them reduce a small buffer together, and each node exchanges a larger one with
the next in a ring: a slow node shows in the links to both of its neighbours, a slow link in one.
"""

import os
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..runtime.context import Context
from .common import MIB

REDUCED_BYTES, EXCHANGED_BYTES = MIB, 4 * MIB
SLOW = 1.5
"""Times as long as usual is slow, in arithmetic as on a link. Usual is what a quarter of them keep to: of three links a
slow node makes two slow."""


@dataclass
class Node:
    """What was measured on a node; seconds, medians over the repeats.

    Attributes:
        processes: how many run there.
        product: of a matrix by itself, in its slowest process.
        link: exchange of ``EXCHANGED_BYTES`` in each direction with the next node of the ring; None: there is but one.
    """

    name: str
    processes: int
    product: float
    link: float | None = None


@dataclass(frozen=True)
class Report:
    """All nodes in order, and the all-reduce of ``REDUCED_BYTES`` over all processes, seconds, every repeat."""

    nodes: list[Node]
    reduce: list[float] = field(default_factory=list)

    def slow(self) -> list[str]:
        """Sentences on nodes and links that take much longer than the others."""
        told = []
        usual = _quartile([node.product for node in self.nodes])
        for node in self.nodes:
            if node.product > SLOW * usual:
                told.append(f"{node.name} computes slowly: {node.product / usual:.1f} times as long as the usual node")
        links = {index: node.link for index, node in enumerate(self.nodes) if node.link is not None}
        if len(links) < 3:  # of two ends of one link nobody can say which is slow
            return told
        usual = _quartile(list(links.values()))
        late = {index for index, seconds in links.items() if seconds > SLOW * usual}
        for index, node in enumerate(self.nodes):
            before = (index - 1) % len(self.nodes)
            if {before, index} <= late:
                factor = min(links[before], links[index]) / usual
                told.append(f"{node.name} sends slowly: {factor:.1f} times as long as usual to both of its neighbours")
        both = {i for i in late if {(i - 1) % len(self.nodes), (i + 1) % len(self.nodes)} & late}
        for index in sorted(late - both):
            after = self.nodes[(index + 1) % len(self.nodes)]
            factor = links[index] / usual
            told.append(
                f"the link {self.nodes[index].name} - {after.name} is slow: {factor:.1f} times as long as usual"
            )
        return told


def measure_nodes(context: Context, repeats: int) -> Report:
    """Measure together; the process group is up if there are several processes.

    Raises:
        RuntimeError: a node does not answer within the time-out of the process group.
    """
    size = 4096 if context.device.type == "cuda" else 512
    matrix = torch.ones(size, size, device=context.device)
    product = statistics.median(_timed(context, lambda: matrix @ matrix, repeats))
    places = context.gather((_node_key(context), node_name(), product))
    keys = list(dict.fromkeys(key for key, _, _ in places))
    first = {key: rank for rank, (key, _, _) in reversed(list(enumerate(places)))}  # its first process
    nodes = []
    for key in keys:
        mine = [(name, seconds) for other, name, seconds in places if other == key]
        nodes.append(Node(mine[0][0], len(mine), max(seconds for _, seconds in mine)))
    reduced = torch.ones(REDUCED_BYTES // 4, device=context.device)
    reduce = _timed(context, lambda: context.sum(reduced.fill_(1.0)), repeats) if context.world_size > 1 else []
    links = {}
    for pairs in ring(len(keys)):
        context.barrier()
        for index, after in pairs:
            ends = first[keys[index]], first[keys[after]]
            if context.rank in ends:
                other = ends[1] if context.rank == ends[0] else ends[0]
                seconds = _timed(context, lambda other=other: _exchange(context, other), repeats)  # type: ignore[misc]
                if context.rank == ends[0]:
                    links[index] = statistics.median(seconds)
    for found in context.gather(links):
        for index, seconds in found.items():
            nodes[index].link = seconds
    return Report(nodes, reduce)


def ring(nodes: int) -> Iterable[Sequence[tuple[int, int]]]:
    """Each node with the next one, in rounds in which no node takes part twice; a single link for two nodes."""
    links = [(index, (index + 1) % nodes) for index in range(nodes if nodes > 2 else nodes - 1)]
    rounds: list[list[tuple[int, int]]] = []
    for link in links:
        free = next((each for each in rounds if not {*link} & {end for pair in each for end in pair}), None)
        if free is None:
            rounds.append([link])
        else:
            free.append(link)
    return rounds


def _quartile(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 4]


def node_name() -> str:
    """What Slurm, or else the system, calls this node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _node_key(context: Context) -> str:
    """Processes with the same one share a node: torchrun numbers its agents, others number process after process."""
    return os.environ.get("GROUP_RANK") or str(context.rank - context.local_rank)


def _exchange(context: Context, other: int) -> None:
    there = torch.ones(EXCHANGED_BYTES // 4, device=context.device)
    here = torch.empty_like(there)
    operations = [dist.P2POp(dist.isend, there, other), dist.P2POp(dist.irecv, here, other)]
    if context.rank > other:
        operations.reverse()
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _timed(context: Context, work: Callable[[], Tensor | None], repeats: int) -> list[float]:
    """Seconds of each repeat, after two that nobody counts."""
    seconds = []
    for turn in range(repeats + 2):
        start = time.perf_counter()
        work()
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        if turn >= 2:
            seconds.append(time.perf_counter() - start)
    return seconds
