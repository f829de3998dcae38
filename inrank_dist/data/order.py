"""The order of training samples: a pure function of the seed and the position."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from .permutation import stable_permutation

#: 2^64 divided by the golden ratio, rounded to an odd number. Multiples of it modulo 2^64 are spread evenly.
GOLDEN = 0x9E3779B97F4A7C15
MODULUS = 1 << 64


class SampleOrder:
    """An endless stream of rows of one or several sources.

    The position decides the source. Source ``s`` owns the interval ``[c_s, c_(s+1))`` of the cumulative shares, and
    position ``p`` takes the source whose interval contains the fractional part of ``p / phi + x``, where ``phi`` is the
    golden ratio and ``x`` depends on the seed. This sequence is spread evenly, so after any number of positions each
    source has its share to within a few rows, which independent random choices would not give. Computed in integers
    modulo 2^64, it is the same on every machine.

    Each source is shuffled with a permutation derived from the seed and from how often it has been used up before.

    Args:
        sizes: number of rows of each source, which follow each other in the data set.
        weights: share of each source relative to the others.
        seed: seed of the order.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._sizes, self._seed = list(sizes), seed
        self._first_rows = np.concatenate([[0], np.cumsum(self._sizes)]).tolist()
        total = sum(map(Fraction, weights))
        cumulative = [sum(map(Fraction, weights[:count]), Fraction(0)) / total for count in range(len(weights) + 1)]
        self._bounds = [int(share * MODULUS) for share in cumulative]
        words = np.random.SeedSequence((seed, len(self._sizes))).generate_state(2, np.uint32)
        self._start = int(words[0]) << 32 | int(words[1])
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def rows(self, first: int, count: int) -> np.ndarray:
        """Row numbers in the data set of the positions from ``first`` on: (count,) int64."""
        rows = np.empty(count, dtype=np.int64)
        used: dict[tuple[int, int], np.ndarray] = {}
        for source, places in enumerate(self._places(first, count)):
            epochs, indices = np.divmod(self.taken(source, first) + np.arange(len(places)), self._sizes[source])
            for epoch in np.unique(epochs).tolist():
                order = used[source, epoch] = self._order(source, epoch)
                chosen = epochs == epoch
                rows[places[chosen]] = self._first_rows[source] + order[indices[chosen]]
        self._orders = used
        return rows

    def taken(self, source: int, position: int) -> int:
        """Number of rows of ``source`` before ``position``."""
        if len(self._sizes) == 1:
            return position
        below = [self._count_below(self._bounds[source + end], position) for end in (0, 1)]
        return below[1] - below[0]

    def _places(self, first: int, count: int) -> list[np.ndarray]:
        """Indices in 0..count-1 of the positions that take each source."""
        if len(self._sizes) == 1:
            return [np.arange(count)]
        with np.errstate(over="ignore"):
            offset = np.uint64((self._start + first * GOLDEN) % MODULUS)
            points = np.arange(count, dtype=np.uint64) * np.uint64(GOLDEN) + offset
        inner = np.array(self._bounds[1:-1], dtype=np.uint64)
        sources = np.searchsorted(inner, points, side="right")
        return [np.flatnonzero(sources == source) for source in range(len(self._sizes))]

    def _count_below(self, bound: int, position: int) -> int:
        """Number of positions ``p < position`` with ``(p * GOLDEN + start) mod 2^64 < bound``."""
        start = self._start
        return (
            position
            + _floor_sum(position, MODULUS, GOLDEN, start)
            - _floor_sum(position, MODULUS, GOLDEN, start + MODULUS - bound)
        )

    def _order(self, source: int, epoch: int) -> np.ndarray:
        if (known := self._orders.get((source, epoch))) is not None:
            return known
        seeds = (self._seed, epoch, source) if source else (self._seed, epoch)
        return stable_permutation(self._sizes[source], *seeds)


def _floor_sum(count: int, modulus: int, factor: int, offset: int) -> int:
    """``sum((factor * i + offset) // modulus for i in range(count))``, by the Euclidean algorithm."""
    total = 0
    while count > 0:
        total += count * (count - 1) // 2 * (factor // modulus) + count * (offset // modulus)
        factor, offset = factor % modulus, offset % modulus
        last = factor * count + offset
        if last < modulus:
            break
        # Count the lattice points below the line by rows instead of by columns.
        count, offset, factor, modulus = last // modulus, last % modulus, modulus, factor
    return total
