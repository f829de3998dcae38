"""Division of small linear-algebra problems among processes.

Each problem is solved by one process, and one all-reduce shares all solutions. This saves time and guarantees that all
processes hold the same solution. Eigenvectors are unique only up to sign, so the same solver can return different signs
on different hardware. Shards that are mapped with different signs would no longer form one factor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], None]
"""Sums a float64 tensor in place over all processes that hold rows of the factors."""


@dataclass(frozen=True)
class Processes:
    """A group of processes, as one of its members sees it.

    Attributes:
        rank: process rank of this process in the group.
        count: number of processes.
        sum: all-reduce over the group.
        agree: ``agree(what, {name: answer})`` raises an error unless all processes pass equal answers. ``what`` names
            the answers in the error.
    """

    rank: int
    count: int
    sum: AllReduce
    agree: Callable[[str, Mapping[str, object]], None] = lambda what, answers: None


ALONE = Processes(0, 1, lambda tensor: None)
"""A group of one process."""


def sum_over_processes(tensors: list[Tensor], all_reduce: AllReduce) -> list[Tensor]:
    """Sum float64 tensors over the processes with a single all-reduce.

    Returns:
        Tensors of the same shapes, views of one flat tensor.
    """
    if not tensors:
        return []
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def whole_matrix(rows: Tensor, first: int, shape: tuple[int, int], processes: Processes) -> Tensor:
    """Return a whole matrix of which each process passes some rows; they are the result if there is only one process.

    Communication: one all-reduce of the bytes of the matrix if there are several processes.

    Args:
        rows: ``(rows, columns)``. Each row is passed by exactly one process.
        first: the first of them.
        shape: of the matrix.
        processes: the processes that hold rows.
    """
    if processes.count == 1:
        return rows
    whole = rows.new_zeros(shape)
    whole[first : first + len(rows)] = rows
    processes.sum(whole)
    return whole


def assign_owners(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Assign each problem to the process rank that solves it.

    Problems are assigned in descending order of size to the process with the least load. The cost of a problem is the
    cube of its size.

    Args:
        sizes: problem -> size.
        count: number of processes.
    """
    load = [0] * count
    owner = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):  # stable, thus the same everywhere
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name] ** 3
    return owner


def solve_once(
    shapes: Mapping[str, Sequence[tuple[int, ...]]],
    solve: Callable[[str], Sequence[Tensor]],
    owner: Mapping[str, int],
    processes: Processes,
) -> dict[str, list[Tensor]]:
    """Solve every problem on its owner and return all solutions on all processes, bitwise equal.

    Communication: one all-reduce of 8 bytes per element of the solutions; none if there is only one process.

    Args:
        shapes: problem -> shapes of the tensors of its solution; equal on all processes.
        solve: returns the float64 solution of a problem; called only for the problems that this process owns.
        owner: problem -> process rank that solves it.
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
