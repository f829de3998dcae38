"""A health check of the nodes in seconds, before a long job that would wait for the slowest one.

Every process multiplies a matrix, all processes all-reduce a small buffer, and each node exchanges a larger buffer with
the next one in a ring. A slow node shows on the links to both of its neighbours, a slow link only once.
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
"""Factor above the usual time at which a node or link counts as slow. The usual time is the lower quartile, because a
slow node slows down two of three links."""


@dataclass
class Node:
    """Measurements of one node; seconds, medians over the repeats.

    Attributes:
        processes: number of processes on the node.
        product: time of a matrix product in its slowest process.
        link: time to exchange ``EXCHANGED_BYTES`` in each direction with the next node in the ring; None for one node.
    """

    name: str
    processes: int
    product: float
    link: float | None = None


@dataclass(frozen=True)
class Report:
    """All nodes in order, and the seconds of each all-reduce of ``REDUCED_BYTES`` over all processes."""

    nodes: list[Node]
    reduce: list[float] = field(default_factory=list)

    def slow(self) -> list[str]:
        """Messages about nodes and links that are much slower than the others."""
        messages = []
        usual = _quartile([node.product for node in self.nodes])
        for node in self.nodes:
            if node.product > SLOW * usual:
                messages.append(
                    f"{node.name} computes slowly: {node.product / usual:.1f} times as long as the usual node"
                )
        links = {index: node.link for index, node in enumerate(self.nodes) if node.link is not None}
        if len(links) < 3:  # with a single link, there is nothing to compare with
            return messages
        usual = _quartile(list(links.values()))
        late = {index for index, seconds in links.items() if seconds > SLOW * usual}
        for index, node in enumerate(self.nodes):
            before = (index - 1) % len(self.nodes)
            if {before, index} <= late:
                factor = min(links[before], links[index]) / usual
                messages.append(
                    f"{node.name} sends slowly: {factor:.1f} times as long as usual to both of its neighbours"
                )
        both = {i for i in late if {(i - 1) % len(self.nodes), (i + 1) % len(self.nodes)} & late}
        for index in sorted(late - both):
            after = self.nodes[(index + 1) % len(self.nodes)]
            factor = links[index] / usual
            messages.append(
                f"the link {self.nodes[index].name} - {after.name} is slow: {factor:.1f} times as long as usual"
            )
        return messages


def measure_nodes(context: Context, repeats: int) -> Report:
    """Measure on all processes, with the process group initialized if there are several.

    Raises:
        RuntimeError: a node does not answer within the timeout of the process group.
    """
    size = 4096 if context.device.type == "cuda" else 512
    matrix = torch.ones(size, size, device=context.device)
    product = statistics.median(_timed(context, lambda: matrix @ matrix, repeats))
    processes = context.gather((_node_key(context), node_name(), product))
    keys = list(dict.fromkeys(key for key, _, _ in processes))
    first = {key: rank for rank, (key, _, _) in reversed(list(enumerate(processes)))}  # first process of each node
    nodes = []
    for key in keys:
        members = [(name, seconds) for other, name, seconds in processes if other == key]
        nodes.append(Node(members[0][0], len(members), max(seconds for _, seconds in members)))
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
    """Pairs of adjacent nodes, in rounds in which each node takes part at most once. Two nodes have a single link."""
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
    """Name of this node, from Slurm or else from the system."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _node_key(context: Context) -> str:
    """Equal for processes on the same node. torchrun numbers its agents; others number processes consecutively."""
    return os.environ.get("GROUP_RANK") or str(context.rank - context.local_rank)


def _exchange(context: Context, other: int) -> None:
    sent = torch.ones(EXCHANGED_BYTES // 4, device=context.device)
    received = torch.empty_like(sent)
    operations = [dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)]
    if context.rank > other:
        operations.reverse()
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _timed(context: Context, work: Callable[[], Tensor | None], repeats: int) -> list[float]:
    """Seconds of each repeat, after two warm-up runs."""
    seconds = []
    for turn in range(repeats + 2):
        start = time.perf_counter()
        work()
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        if turn >= 2:
            seconds.append(time.perf_counter() - start)
    return seconds
