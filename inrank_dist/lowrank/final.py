"""Final ranks: how many modes each layer keeps at the freeze."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

Final = Literal["per_layer", "uniform", "budget"]
Shape = tuple[int, int]


def uniform_ranks(
    ranks: Mapping[str, int], shapes: Mapping[str, Shape], caps: Mapping[str, int], multiple_of: int
) -> dict[str, int]:
    """One rank for all layers with about as many parameters as ``ranks``: their mean weighted by ``in + out``, rounded
    to ``multiple_of``, at most the smallest of ``caps``."""
    weights = {name: sum(shapes[name]) for name in ranks}
    mean = sum(ranks[name] * weights[name] for name in ranks) / sum(weights.values())
    rank = max(round(mean / multiple_of), 1) * multiple_of
    return dict.fromkeys(ranks, min(rank, *(caps[name] for name in ranks)))


def budget_ranks(
    sigmas: Mapping[str, Tensor], shapes: Mapping[str, Shape], fraction: float, multiple_of: int
) -> dict[str, int]:
    """Ranks that discard the least energy, over all layers together, within a budget of parameters.

    Modes are taken in groups of ``multiple_of``, each time the group that saves the most energy ``sum sigma^2`` for
    each of its ``in + out`` parameters; every layer keeps at least one group, even where the budget does not suffice.

    Args:
        sigmas: layer -> ``(R,)`` singular values, descending; no layer gets more than its ``R``.
        fraction: the budget, as a fraction of the dense parameters ``in * out`` of these layers.
    """
    budget = fraction * sum(out * in_ for out, in_ in (shapes[name] for name in sigmas))
    ranks = {}
    candidates = []
    for position, (name, sigma) in enumerate(sigmas.items()):
        cost = sum(shapes[name])
        ranks[name] = min(multiple_of, len(sigma))
        budget -= ranks[name] * cost
        for start in range(multiple_of, len(sigma) - multiple_of + 1, multiple_of):
            energy = float(sigma[start : start + multiple_of].square().sum())
            candidates.append((-energy / cost, start, position, name))
    # Within a layer the groups come in descending order; equal ones in theirs, so that no group is taken before its
    # predecessor.
    stopped: set[str] = set()
    for _, _, _, name in sorted(candidates):
        cost = multiple_of * sum(shapes[name])
        if name in stopped or cost > budget:
            stopped.add(name)
            continue
        ranks[name] += multiple_of
        budget -= cost
    return ranks
