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
    P, sigma, Q_t = torch.linalg.svd(R_U @ R_V.T)
    keep = len(sigma)
    if energy is not None:
        left = sigma.square().flip(0).cumsum(0).flip(0)  # energy of each mode and all smaller ones, smallest first
        discardable = left <= (1 - energy) * left[:1]
        keep = int((~discardable).sum())
    if rank is not None:
        keep = min(keep, rank)
    keep = max(keep, 1)
    root = sigma[:keep].sqrt()
    return Truncated(Factors(Q_U @ P[:, :keep] * root, Q_V @ Q_t[:keep].T * root), sigma)
