"""Small problems divided among processes: each is solved once, and the answers are shared by one collective.

That saves time, and it is what makes every process hold the same answer: an eigensolver may choose other signs on other
hardware, and maps that differ in a sign would mix the rows of different processes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], None]
"""Sums a float64 tensor in place over all processes that hold rows."""


@dataclass(frozen=True)
class Processes:
    """Those who solve together.

    Attributes:
        rank, count: of this process, and how many there are.
        sum: their all-reduce.
        agree: checks that all processes hold the same answers, ``agree(what, {name: answer})``; raises otherwise.
    """

    rank: int
    count: int
    sum: AllReduce
    agree: Callable[[str, Mapping[str, object]], None] = lambda what, answers: None


ALONE = Processes(0, 1, lambda tensor: None)
"""A process without others."""


def sum_over_processes(tensors: list[Tensor], all_reduce: AllReduce) -> list[Tensor]:
    """Sum float64 tensors over processes with one collective, whatever their number."""
    if not tensors:
        return []
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def assign_owners(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Who solves which problem: largest first, each to the least loaded process; cost is the cube of the size."""
    load = [0] * count
    owner = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):  # stable: equal sizes keep their order
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name] ** 3
    return owner


def solve_once(
    shapes: Mapping[str, Sequence[tuple[int, ...]]],
    solve: Callable[[str], Sequence[Tensor]],
    owner: Mapping[str, int],
    processes: Processes,
) -> dict[str, list[Tensor]]:
    """Solve every problem in its owner's process; return all answers in all processes, equal bit for bit.

    One collective of 8 bytes for each number in ``shapes`` (none where a process is alone).

    Args:
        shapes: problem -> shapes of its answer, known to all.
        solve: called for this process's own problems; float64 answers of these shapes.
    """
    answers = {
        name: list(solve(name))
        if owner[name] == processes.rank
        else [torch.zeros(shape, dtype=torch.float64) for shape in each]
        for name, each in shapes.items()
    }
    if processes.count == 1:
        return answers
    summed = iter(sum_over_processes([tensor for each in answers.values() for tensor in each], processes.sum))
    return {name: [next(summed) for _ in each] for name, each in answers.items()}
