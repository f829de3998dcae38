"""Outer factors from one gradient (``lowrank.outer_init: gradient``), the compressed form of a deep network.

Source: Yaras et al., Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation, arXiv 2406.04112.
A chain of wide matrices ``W_L ... W_1`` that start as ``eps`` times orthogonal matrices learns in a subspace that one
gradient ``G`` at the start determines. The compressed network is ``U1 C_L ... C_1 V1^T`` with ``C_l(0) = eps I``.
``V1`` spans the top right singular vectors ``V_G`` of ``G`` and ``O^T U_G``, where ``U_G`` are the left ones and
``O = W_L ... W_1 / eps^L`` is orthogonal, and ``U1 = O V1``.

``O`` is never formed here. The columns are ``U1 = [R_U, U_G]`` and ``V1 = [V_G, R_V]`` with random orthonormal ``R_U``
and ``R_V``, orthogonal to the others: those of a random ``O`` that maps ``V_G`` to ``R_U`` and ``R_V`` to ``U_G``. A
network of ``L`` wide matrices has the depth ``L + 2`` here.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..lowrank.cores import SMALLEST
from ..lowrank.division import assign_owners, solve_once
from ..lowrank.spectrum import Factors, Grams, gram_matrices, gram_root
from ..runtime.errors import UserError
from .directions import RANDOM_SHARE, Gradients
from .holder import FactorHolder


def start_outer_factors(holder: FactorHolder, gradients: Gradients) -> None:
    """Set ``U`` and ``V`` of all layers from the gradient of their weights without the product of the factors.

    The singular vectors come from a sketch of ``R`` columns, of which half are used (Halko, Martinsson, Tropp, arXiv
    0909.4061, algorithm 4.4), as in ``method.directions``.

    Communication, besides two backward passes: all-reduces of ``8 * sum 4 R * (R + 1)`` bytes for Grams and of
    ``8 * sum 5 R^2`` bytes for their solutions.

    Args:
        holder: holds the factors. ``U`` and ``V`` have random orthonormal columns, and all cores are multiples of the
            identity.
        gradients: computes the gradients of all factors on one global batch. It is called twice.

    Raises:
        UserError: on all processes, if the gradient is not finite.
    """
    sizes = {layer: each.modes for layer, each in holder.layout.items()}
    random = {layer: Factors(held.U.clone(), held.V.clone()) for layer, held in holder.held_rows(sizes).items()}

    for layer, rows in random.items():
        holder.set_columns(layer, 0, 0.0, rows.V)
    sketch = {layer: found.U.double() for layer, found in gradients().items()}  # a multiple of G @ V
    basis = _mapped(holder, {layer: Factors(rows, rows) for layer, rows in sketch.items()}, _orthonormalising)
    for layer, rows in basis.items():
        holder.set_columns(layer, 0, rows.U.to(random[layer].U.dtype), 0.0)
    images = {layer: found.V.double() for layer, found in gradients().items()}  # a multiple of G^T @ Q
    pairs = {layer: Factors(basis[layer].U, images[layer]) for layer in sizes}
    singular = _mapped(holder, pairs, _singular_vectors)

    joined = {}
    for layer, size in sizes.items():
        half = (size + 1) // 2
        noise = random[layer]
        left = singular[layer].U + RANDOM_SHARE * noise.U  # matters only if the gradient has a low rank
        right = singular[layer].V + RANDOM_SHARE * noise.V
        joined[layer] = Factors(
            torch.cat([left[:, : size - half], noise.U[:, size - half :].double()], dim=1),
            torch.cat([right[:, :half], noise.V[:, half:].double()], dim=1),
        )
    for _ in range(2):  # once more, because the first Gram is less exact
        joined = _mapped(holder, joined, _triangular)
    for layer, rows in joined.items():
        used = sizes[layer] - (sizes[layer] + 1) // 2
        U = torch.cat([rows.U[:, used:], rows.U[:, :used]], dim=1)
        holder.set_columns(layer, 0, U.to(random[layer].U.dtype), rows.V.to(random[layer].V.dtype))


def _mapped(
    holder: FactorHolder, rows: Mapping[str, Factors], solve: Callable[[Grams], list[Tensor]]
) -> dict[str, Factors]:
    """Multiply the held rows of pairs ``(rows, R)`` by matrices ``(R, R)`` that ``solve`` derives from their Grams."""
    counted = {layer: holder.counted(layer, each) for layer, each in rows.items()}
    grams = gram_matrices(counted, holder.processes.sum)
    for layer, each in grams.items():
        if not (each.U.isfinite().all() and each.V.isfinite().all()):
            raise UserError(
                f"the gradient of {layer} at the first batch is not finite (inf or nan); write "
                "lowrank.outer_init: random"
            )
    sizes = {layer: each.modes for layer, each in rows.items()}
    owner = assign_owners(sizes, holder.processes.count)
    shapes = {layer: [(size, size), (size, size)] for layer, size in sizes.items()}
    maps = solve_once(
        shapes, lambda layer: solve(Grams(grams[layer].U.cpu(), grams[layer].V.cpu())), owner, holder.processes
    )
    return {
        layer: Factors(each.U @ maps[layer][0].to(each.U.device), each.V @ maps[layer][1].to(each.V.device))
        for layer, each in rows.items()
    }


def _orthonormalising(grams: Grams) -> list[Tensor]:
    """Return a map to an orthonormal basis, with zero columns where the rank is lower, for both factors."""
    return [_padded(gram_root(each).inverse) for each in (grams.U, grams.V)]


def _singular_vectors(grams: Grams) -> list[Tensor]:
    """Return maps of ``Q`` and ``G^T Q`` to left and right singular vectors, in descending order of their values.

    Vectors whose values are rounding errors are set to zero.
    """
    values, vectors = torch.linalg.eigh(grams.V)
    values, vectors = values.flip(0), vectors.flip(1)
    floor = values[:1].clamp_min(torch.finfo(values.dtype).tiny) * SMALLEST**2
    vectors = vectors * (values > floor)
    return [vectors, vectors / values.clamp_min(floor).sqrt()]


def _triangular(grams: Grams) -> list[Tensor]:
    """Return maps that orthonormalise the columns one after the other, each against those before it."""
    identity = torch.eye(len(grams.U), dtype=grams.U.dtype)
    return [
        torch.linalg.solve_triangular(torch.linalg.cholesky(each), identity, upper=False).T
        for each in (grams.U, grams.V)
    ]


def _padded(matrix: Tensor) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, matrix.shape[0] - matrix.shape[1]))
