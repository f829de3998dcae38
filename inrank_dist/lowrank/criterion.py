"""The explained ratio of a spectrum and the rule that derives a rank from it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Residual = Callable[[Tensor, Tensor, int], Tensor]
"""Function ``(squares, sums, dimension) -> residual``: the part of a spectrum that its first ``q`` modes leave
unexplained, for ``q = 0 ... R``. ``squares`` and ``sums`` are the sums of ``sigma_i^2`` and ``sigma_i`` over the tail
``i > q``, and ``dimension`` is ``min(in, out)``. All three tensors are ``(R + 1,)``. The explained ratio is
``g(q) = 1 - residual[q] / residual[0]``."""

RESIDUALS: dict[str, Residual] = {
    "energy": lambda squares, sums, dimension: squares,
    "variance": lambda squares, sums, dimension: squares / dimension - (sums / dimension).square(),
}
"""Value of the setting ``lowrank.criterion`` -> residual."""


def explained_ratio(sigma: Tensor, dimension: int, criterion: str) -> Tensor:
    """Compute the explained ratio ``g(q)`` of the first ``q`` singular values, for ``q = 0 ... R``.

    ``energy``: ``g(q) = sum_{i<=q} sigma_i^2 / sum_i sigma_i^2``.

    ``variance`` (the published code of arXiv 2306.11250): ``g(q) = 1 - var(s_q) / var(s_0)``, where ``s_q`` is the
    spectrum with its first ``q`` values set to zero. The variance is taken over all ``dimension`` singular values,
    including the ``dimension - R`` structural zeros. This ratio is not monotone in ``q``, and it is negative for small
    ``q`` if the spectrum is flat.

    Args:
        sigma: ``(R,)`` singular values, descending, float64.
        dimension: ``min(in, out)``, at least ``R``.
        criterion: ``energy`` or ``variance``.

    Returns:
        ``(R + 1,)`` float64, ``g(0) ... g(R)``; ones if the energy or the variance of the spectrum is zero.
    """
    zero = sigma.new_zeros(1)
    # Tail sums accumulate the smallest values first; a difference of large totals would lose a small tail.
    squares = torch.cat([sigma.square().flip(0).cumsum(0).flip(0), zero])
    residual = RESIDUALS[criterion](squares, torch.cat([sigma.flip(0).cumsum(0).flip(0), zero]), dimension)
    # If all singular values are equal, the variance is zero and the computed one is rounding error of either sign.
    rounding = len(sigma) * torch.finfo(sigma.dtype).eps
    if residual[0] <= squares[0] / dimension * rounding:
        return torch.ones_like(residual)
    return 1 - residual / residual[0]


def effective_rank(sigma: Tensor) -> float:
    """Return the nuclear norm divided by the spectral norm (Kamalakara et al., arXiv 2209.13569); 0 for a zero matrix.

    Args:
        sigma: ``(R,)`` singular values, descending.
    """
    top = float(sigma[0]) if sigma.numel() else 0.0
    return float(sigma.sum()) / top if top > 0 else 0.0


def stable_rank(sigma: Tensor) -> float:
    """Return the squared Frobenius norm divided by the squared spectral norm; 0 for a zero matrix.

    Args:
        sigma: ``(R,)`` singular values, descending.
    """
    top = float(sigma[0]) if sigma.numel() else 0.0
    return float((sigma / top).square().sum()) if top > 0 else 0.0


@dataclass(frozen=True)
class Decision:
    """The result of the rule for one layer.

    Attributes:
        before, after: active rank ``r`` before and after the decision.
        explained: explained ratio ``g(before)``.
        reached: explained ratio ``g(after)``. It is below the threshold if the number of modes or the cap limits the
            rank.
        effective_rank: effective rank of the measured spectrum.
    """

    before: int
    after: int
    explained: float
    reached: float
    effective_rank: float


@dataclass(frozen=True)
class RankRule:
    """The rule of InRank (arXiv 2306.11250): if ``g(r) < threshold``, raise ``r`` to the smallest ``q`` with
    ``g(q) >= threshold``.

    Attributes:
        threshold: explained ratio to reach, in (0, 1).
        criterion: how the explained ratio is computed, see ``explained_ratio``.
        buffer: number ``b`` of modes trained beyond ``r``. It limits by how much one decision can raise the rank.
        max_rank_fraction: cap of ``r`` as a fraction of ``min(in, out)``.
        multiple_of: a new rank is rounded up to a multiple of this.
    """

    threshold: float
    criterion: str
    buffer: int
    max_rank_fraction: float
    multiple_of: int

    def cap(self, dimension: int) -> int:
        """Return the largest active rank of a layer with ``min(in, out) = dimension``; at least 1."""
        cap = int(self.max_rank_fraction * dimension + 1e-9)  # 0.29 * 100 is 28.999999999999996 in floating point
        return max(cap - cap % self.multiple_of, 1)

    def modes(self, rank: int, dimension: int) -> int:
        """Return the number of modes ``R`` of an active rank: rank plus buffer, at most ``dimension``."""
        return min(rank + self.buffer, dimension)

    def decide(self, sigma: Tensor, rank: int, dimension: int, *, may_shrink: bool = False) -> Decision:
        """Apply the rule once.

        Args:
            sigma: ``(R,)`` float64 singular values, descending.
            rank: current active rank ``r``; ``dimension`` for a dense layer.
            dimension: ``min(in, out)`` of the layer.
            may_shrink: whether ``r`` may also be lowered to the smallest ``q`` that reaches the threshold.
        """
        ratio = explained_ratio(sigma, dimension, self.criterion)
        last = min(len(ratio) - 1, self.modes(rank, dimension))
        present = float(ratio[min(rank, last)])
        after, least = rank, 1 if may_shrink else rank
        if present < self.threshold or may_shrink:
            reached = (ratio[least : last + 1] >= self.threshold).nonzero()
            after = least + int(reached[0]) if len(reached) else last
            after += -after % self.multiple_of
            after = max(least, min(after, self.cap(dimension)))
        return Decision(rank, after, present, float(ratio[min(after, len(ratio) - 1)]), effective_rank(sigma))
