"""Spectra of the cumulative updates ``W(t) - W(0)`` of dense layers (arXiv 2306.11250, figure 1)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .division import Processes, assign_owners, solve_once
from .spectrum import dense_singular_values

#: Singular values up to this index are recorded one by one, and a quarter of an octave apart above it.
DENSE_UP_TO = 64


def update_spectra(
    rows: Callable[[str], tuple[int, Tensor]],
    shapes: Mapping[str, tuple[int, int]],
    initial: Callable[[str], Tensor],
    processes: Processes,
) -> dict[str, Tensor]:
    """Compute the singular values of ``W(t) - W(0)`` of all layers.

    One layer after the other is summed from its rows in float32, as in a forward pass of FSDP, and solved by one
    process, which alone draws ``W(0)``. The difference and its Gram matrix are in float64, so singular values below
    about 1e-8 of the largest are rounding error.

    Communication: one all-reduce of ``4 * out * in`` bytes per layer if there are several processes, and one of 8 bytes
    per singular value. Peak extra memory: one dense layer, and on its owner three more in float64.

    Args:
        rows: layer -> its first row and the rows that this process counts, ``(rows, in)`` float32. Each row is counted
            by exactly one process.
        shapes: layer -> ``(out, in)``, in the same order on all processes.
        initial: layer -> ``W(0)``, ``(out, in)`` on the CPU.
        processes: the processes that hold rows.

    Returns:
        Layer -> ``(min(out, in),)`` float64, descending, on the CPU; bitwise equal on all processes.
    """
    owner = assign_owners({name: min(shape) for name, shape in shapes.items()}, processes.count)
    solved: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        first, held = rows(name)
        weight = held
        if processes.count > 1:
            weight = held.new_zeros(shape)
            weight[first : first + len(held)] = held
            processes.sum(weight)
        if owner[name] == processes.rank:
            solved[name] = dense_singular_values(weight.double() - initial(name).to(weight.device, torch.float64))
    sizes = {name: [(min(shape),)] for name, shape in shapes.items()}
    answers = solve_once(sizes, lambda name: [solved[name]], owner, processes)
    return {name: sigma for name, (sigma,) in answers.items()}


def recorded_indices(count: int) -> list[int]:
    """Return the indices of the singular values to record: the first ``DENSE_UP_TO``, then in geometric distances."""
    indices = list(range(min(count, DENSE_UP_TO)))
    step = 1
    while (index := round(DENSE_UP_TO * 2 ** (step / 4)) - 1) < count:
        indices.append(index)
        step += 1
    if count > DENSE_UP_TO and indices[-1] != count - 1:
        indices.append(count - 1)
    return indices


def recorded_spectrum(sigma: Tensor) -> dict[str, Any]:
    """Return the singular values to record as ``sigma``, with six significant digits, and their ``indices`` from 1.

    Args:
        sigma: ``(R,)`` singular values, descending.
    """
    indices = recorded_indices(len(sigma))
    return {
        "indices": [index + 1 for index in indices],
        "sigma": [float(f"{value:.6g}") for value in sigma[indices].tolist()],
    }
