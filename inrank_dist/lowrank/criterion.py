"""From singular values to a rank: the explained ratio and the rule."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Residual = Callable[[Tensor, Tensor, int], Tensor]
"""Sums over the tails ``i > q`` of ``sigma_i^2`` and of ``sigma_i``, each ``(R + 1,)`` for ``q = 0 ... R``, and
``min(in, out)`` -> what the first ``q`` modes leave unexplained, ``(R + 1,)``. Its share of the first is ``1 - g``."""

RESIDUALS: dict[str, Residual] = {
    "energy": lambda squares, sums, dimension: squares,
    "variance": lambda squares, sums, dimension: squares / dimension - (sums / dimension).square(),
}
"""``lowrank.criterion`` -> how much of a spectrum is left."""


def explained_ratio(sigma: Tensor, dimension: int, criterion: str) -> Tensor:
    """How much of a spectrum its first ``q`` modes hold, for every ``q``.

    ``energy``: ``g(q) = sum_{i<=q} sigma_i^2 / sum_i sigma_i^2``.
    ``variance`` (as in the published code of arXiv 2306.11250): ``g(q) = 1 - var(s_q) / var(s_0)``, where ``s_q`` is
    the spectrum with its first ``q`` values set to zero and the variance runs over all ``dimension`` values about their
    mean, structural zeros included. It is not monotone in ``q`` and below zero for small ``q`` of a flat spectrum.

    Args:
        sigma: ``(R,)`` singular values, descending, float64.
        dimension: ``min(in, out)``, at least ``R``.
        criterion: which of the two.

    Returns:
        ``(R + 1,)`` float64, ``g(0) ... g(R)``. A spectrum with nothing to explain (zeros, or no variance) gives ones.
    """
    zero = sigma.new_zeros(1)
    # Sums over the tail i > q for q = 0 ... R; from the small end, so that a tiny tail is not lost in a large total.
    squares = torch.cat([sigma.square().flip(0).cumsum(0).flip(0), zero])
    residual = RESIDUALS[criterion](squares, torch.cat([sigma.flip(0).cumsum(0).flip(0), zero]), dimension)
    # Equal values in every dimension have no variance; what is computed for it is rounding, of either sign.
    rounding = len(sigma) * torch.finfo(sigma.dtype).eps
    if residual[0] <= squares[0] / dimension * rounding:
        return torch.ones_like(residual)
    return 1 - residual / residual[0]


def effective_rank(sigma: Tensor) -> float:
    """Nuclear over spectral norm, ``|W|_* / |W|_op`` (Kamalakara et al., arXiv 2209.13569); 0 for a zero matrix."""
    top = float(sigma[0]) if sigma.numel() else 0.0
    return float(sigma.sum()) / top if top > 0 else 0.0


@dataclass(frozen=True)
class Decision:
    """What the rule says of one layer.

    Attributes:
        before, after: active rank ``r`` before and after.
        explained: ``g(before)``, the share that the rank so far explains.
        reached: ``g(after)``, the share that the chosen rank explains; below the threshold where a cap stopped it.
        effective_rank: of the measured spectrum.
    """

    before: int
    after: int
    explained: float
    reached: float
    effective_rank: float


@dataclass(frozen=True)
class RankRule:
    """The rule of InRank (arXiv 2306.11250): if ``g(r) < threshold``, raise ``r`` to the smallest ``q`` that reaches
    it.

    Attributes:
        threshold: explained ratio to reach, in (0, 1).
        criterion: how the ratio is computed.
        buffer: ``b``, modes trained beyond ``r``; also the most that one decision can add.
        max_rank_fraction: cap of ``r`` as a fraction of ``min(in, out)``.
        multiple_of: a raised rank is rounded up to a multiple of this.
    """

    threshold: float
    criterion: str
    buffer: int
    max_rank_fraction: float
    multiple_of: int

    def cap(self, dimension: int) -> int:
        """Largest active rank of a layer with ``min(in, out) = dimension``; at least 1."""
        cap = int(self.max_rank_fraction * dimension + 1e-9)  # 0.29 * 100 is 28.999999999999996
        return max(cap - cap % self.multiple_of, 1)

    def modes(self, rank: int, dimension: int) -> int:
        """``R`` for an active rank: rank and buffer, at most ``dimension``."""
        return min(rank + self.buffer, dimension)

    def decide(self, sigma: Tensor, rank: int, dimension: int, *, may_shrink: bool = False) -> Decision:
        """Apply the rule once.

        Args:
            sigma: ``(R,)`` float64 singular values, descending.
            rank: present active rank ``r``; of a dense layer ``dimension``.
            dimension: ``min(in, out)`` of the layer.
            may_shrink: also lower ``r`` to the smallest ``q`` that reaches the threshold.
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
