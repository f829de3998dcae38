"""Deep linear networks ``W_L ... W_1`` in float64: orthogonal starts, products and gradients."""

import torch
from torch import Tensor

Weights = list[Tensor]
"""The factors of a product, the one that acts first at index 0: ``W_1, ..., W_L``."""


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A uniformly distributed ``(rows, columns)`` float64 matrix with orthonormal columns (rows, where there are more
    columns)."""
    if rows < columns:
        return orthonormal(columns, rows, generator).T
    q, r = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    # A positive diagonal of R makes the distribution uniform.
    return q * r.diagonal().sign()


def product(weights: Weights) -> Tensor:
    """``W_L ... W_1``."""
    result = weights[0]
    for weight in weights[1:]:
        result = weight @ result
    return result


def gradients(weights: Weights, residual: Tensor) -> Weights:
    """Gradients of ``f(W_L ... W_1)`` with respect to the factors.

    Layer ``l`` has ``(W_L ... W_{l+1})^T R (W_{l-1} ... W_1)^T``. Takes ``3 (L - 1)`` products less one for each end.

    Args:
        residual: ``R``, the gradient of ``f`` with respect to the product.
    """
    below = [weights[0]]
    for weight in weights[1:-1]:
        below.append(weight @ below[-1])
    found: Weights = []
    above = residual
    for index in range(len(weights) - 1, 0, -1):
        found.append(above @ below[index - 1].T)
        above = weights[index].T @ above
    return [above, *reversed(found)]


def relative_error(found: Tensor, target: Tensor) -> float:
    """``|found - target|_F / |target|_F``."""
    return float((found - target).norm() / target.norm())


def touched_directions(first: Tensor, gradient: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Input directions that training changes and those that it leaves, from one gradient at the start.

    For layers that start at ``eps`` times orthogonal matrices and a target of rank ``r``. Both the top right singular
    vectors of the gradient and its top left ones, taken back through the layer, are touched; nothing else is (Yaras et
    al., arXiv 2306.01154 and 2406.04112).

    Args:
        first: ``(d, d)``, ``W_1`` at the start.
        gradient: ``(d, d)``, the gradient of ``W_1`` there.
        rank: ``r``, or an upper limit of it.

    Returns:
        Orthonormal columns ``V1: (d, 2r)`` and ``V2: (d, d - 2r)``.
    """
    left, _, right = torch.linalg.svd(gradient)
    both = torch.cat([first.T @ left[:, :rank] / first[:, 0].norm(), right[:rank].T], 1)
    basis, _ = torch.linalg.qr(both, mode="complete")
    return basis[:, : 2 * rank], basis[:, 2 * rank :]
