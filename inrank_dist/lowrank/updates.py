"""Spectra of dense layers, and of their cumulative updates ``W(t) - W(0)`` (arXiv 2306.11250, figure 1)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .division import Processes, assign_owners, solve_once, whole_matrix
from .spectrum import dense_singular_values, gram_of_rows, singular_values_of_gram

#: Singular values up to this index are recorded one by one, and a quarter of an octave apart above it.
DENSE_UP_TO = 64


def weight_spectra(
    rows: Callable[[str], tuple[int, Tensor]],
    shapes: Mapping[str, tuple[int, int]],
    processes: Processes,
    initial: Callable[[str], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Compute the singular values of ``W(t)``, or of ``W(t) - W(0)``, of all layers.

    One layer after the other is summed over the processes and solved by one of them. Of ``W(t)`` with ``in <= out``
    this is the Gram matrix ``W^T W``; every other layer is summed from its rows, as in a forward pass of FSDP. The
    owner alone draws ``W(0)``. Differences and Gram matrices are in float64, so singular values below about 1e-8 of the
    largest are rounding error.

    Communication: an all-reduce for each layer if there are several processes, of ``4 * in * (in + 1)`` bytes for a
    Gram matrix or ``4 * out * in`` bytes for a layer, and one of 8 bytes per singular value. Peak extra memory: one
    Gram matrix in float64 and the rows of this process, or one dense layer; on its owner three more in float64.

    Args:
        rows: layer -> its first row and the rows that this process counts, ``(rows, in)`` float32. Each row is counted
            by exactly one process.
        shapes: layer -> ``(out, in)``, in the same order on all processes.
        processes: the processes that hold rows.
        initial: layer -> ``W(0)``, ``(out, in)`` on the CPU. None: the singular values of ``W(t)``.

    Returns:
        Layer -> ``(min(out, in),)`` float64, descending, on the CPU; bitwise equal on all processes. They are NaN if
        the weight is not finite.
    """
    owner = assign_owners({name: min(shape) for name, shape in shapes.items()}, processes.count)
    solved: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        first, held = rows(name)
        is_owner = owner[name] == processes.rank
        if initial is None and shape[1] <= shape[0]:
            gram = gram_of_rows(held, processes.sum)
            if is_owner:
                solved[name] = singular_values_of_gram(gram)
            continue
        weight = whole_matrix(held, first, shape, processes)
        if is_owner:
            start = 0 if initial is None else initial(name).to(weight.device, torch.float64)
            solved[name] = dense_singular_values(weight.double() - start)
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
