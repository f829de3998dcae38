"""Truncation of one layer's product of whole factors, without a rank event."""

from typing import NamedTuple

import torch
from torch import Tensor

from .spectrum import Factors


class Truncated(NamedTuple):
    """Truncated factors.

    Attributes:
        factors: float64 ``U: (out, k)`` and ``V: (in, k)`` with ``U.T @ U == V.T @ V``, the truncated singular values.
        sigma: ``(R,)`` float64 singular values of the product before the truncation, descending.
    """

    factors: Factors
    sigma: Tensor


def truncated(factors: Factors, *, rank: int | None = None, energy: float | None = None) -> Truncated:
    """Return the best approximation of ``U @ V.T`` in the Frobenius norm (Eckart and Young, 1936), balanced.

    It is computed in float64 from the QR decompositions of both factors.

    Args:
        factors: ``U: (out, R)`` and ``V: (in, R)``.
        rank: highest rank.
        energy: share of the squared singular values to keep. The rank is the smallest that keeps as much.
    """
    Q_U, R_U = torch.linalg.qr(factors.U.double())
    Q_V, R_V = torch.linalg.qr(factors.V.double())
    inner = truncated_weight(R_U @ R_V.T, rank=rank, energy=energy)
    return Truncated(Factors(Q_U @ inner.factors.U, Q_V @ inner.factors.V), inner.sigma)


def truncated_weight(weight: Tensor, *, rank: int | None = None, energy: float | None = None) -> Truncated:
    """Return the best approximation of a dense matrix in the Frobenius norm as balanced factors.

    Args:
        weight: ``(out, in)``.
        rank, energy: as for ``truncated``.

    Raises:
        ValueError: the matrix is not finite.
    """
    if not bool(weight.isfinite().all()):
        raise ValueError("the weight is not finite (inf or nan)")
    left, sigma, right = torch.linalg.svd(weight.double(), full_matrices=False)
    # Singular vectors are unique up to their signs. Processes must choose the same ones.
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    left, right = left * signs, right * signs.T
    keep = len(sigma)
    if energy is not None:
        tail = sigma.square().flip(0).cumsum(0).flip(0)  # energy of each mode and all smaller ones, smallest first
        keep = int((tail > (1 - energy) * tail[:1]).sum())
    keep = max(keep if rank is None else min(keep, rank), 1)
    root = sigma[:keep].sqrt()
    return Truncated(Factors(left[:, :keep] * root, right[:keep].T * root), sigma)
