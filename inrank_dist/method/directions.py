"""Initialisation of new modes along the top singular directions of the gradient (``lowrank.growth_init: gradient``).

This is the greedy choice of GLRL (Li, Luo, Lyu, arXiv 2012.09839) for factors that are sharded by rows. The gradient
``G: (out, in)`` of a weight is never formed. Two backward passes compute one step of subspace iteration with
``G.T @ G`` from random columns (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4):

1. The fresh columns of ``U`` are zero. Their gradient is ``G @ V_fresh``, a random sketch of the range of ``G``.
2. The fresh columns of ``U`` are set to an orthonormal basis ``Q`` of the sketch and those of ``V`` to zero. The
   gradient of the fresh columns of ``V`` is then ``G.T @ Q``.

The sketch has exactly ``F`` columns. Without oversampling, it can miss a top direction to which the random columns are
nearly orthogonal.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..lowrank.division import assign_owners, solve_once
from ..lowrank.event import grow, map_factors, orthogonalise
from ..lowrank.spectrum import Factors, gram_matrices, gram_root, measure_spectra
from .holder import FactorHolder

Gradients = Callable[[], Mapping[str, Factors]]
"""Returns the gradients of the factors of every layer, for all rows that this process holds. The parameters do not
change."""

RANDOM_SHARE = 1e-6
"""Weight of the random directions relative to the gradient. They matter only if the gradient has a rank below ``F``."""


def aim_at_gradient(holder: FactorHolder, fresh: Mapping[str, int], gradients: Gradients) -> None:
    """Set the fresh columns of ``V`` to the top right singular directions of the gradient outside the span of the other
    columns.

    The fresh columns of ``U`` are zero before and after the call, so the model computes the same function.

    Communication, besides two backward passes: all-reduces of ``8 * sum F * (F + 1)`` bytes for Grams, ``8 * sum F^2``
    bytes for their solutions and 8 bytes per layer for norms, and those of ``measure_spectra`` and ``orthogonalise``.

    Args:
        holder: holds the factors.
        fresh: layer -> number ``F`` of fresh columns, which are the last ones. ``V`` has orthonormal fresh columns, and
            those of ``U`` are zero.
        gradients: computes the gradients of all factors on one global batch. It is called twice.
    """
    processes = holder.processes
    first = {layer: holder.layout[layer].modes - count for layer, count in fresh.items()}
    random = {layer: held.V[:, first[layer] :].clone() for layer, held in holder.held_rows(fresh).items()}

    found = gradients()
    sketch = {layer: found[layer].U[:, first[layer] :].double() for layer in fresh}
    counted = {layer: holder.counted(layer, Factors(rows, found[layer].V)).U for layer, rows in sketch.items()}
    grams = gram_matrices({layer: Factors(rows, rows) for layer, rows in counted.items()}, processes.sum)

    def solve(layer: str) -> list[Tensor]:
        inverse = gram_root(grams[layer].U.cpu()).inverse  # (F, k), k < F if the rank of the gradient is less
        return [torch.nn.functional.pad(inverse, (0, fresh[layer] - inverse.shape[1]))]

    owner = assign_owners(fresh, processes.count)
    inverses = solve_once({layer: [(count, count)] for layer, count in fresh.items()}, solve, owner, processes)
    for layer, rows in sketch.items():
        basis = rows @ inverses[layer][0].to(rows.device)
        holder.set_columns(layer, first[layer], basis.to(random[layer].dtype), 0.0)

    found = gradients()
    directions, scale = {}, {}
    for layer in fresh:
        holder.set_columns(layer, first[layer], 0.0, random[layer])
        directions[layer] = found[layer].V[:, first[layer] :].double()
        scale[layer] = holder.counted(layer, Factors(found[layer].U, directions[layer])).V.square().sum()
    total = torch.stack(list(scale.values()))
    processes.sum(total)
    for layer, norm in zip(fresh, total.sqrt(), strict=True):
        directions[layer] = directions[layer] / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        directions[layer] += RANDOM_SHARE * random[layer]

    held = holder.held_rows(fresh)
    old = {layer: Factors(rows.U[:, : first[layer]], rows.V[:, : first[layer]]) for layer, rows in held.items()}
    counted_old = {layer: holder.counted(layer, rows) for layer, rows in old.items()}
    events = {layer: grow(first[layer], holder.layout[layer].modes) for layer in fresh}
    spectra = measure_spectra(counted_old, processes)
    overlapping = {layer: holder.counted(layer, Factors(old[layer].U, rows)).V for layer, rows in directions.items()}
    for layer, event in orthogonalise(events, counted_old, spectra, overlapping, processes).items():
        turned = map_factors(event, old[layer].U, old[layer].V, directions[layer])
        holder.set_columns(layer, first[layer], 0.0, turned.V[:, first[layer] :])
