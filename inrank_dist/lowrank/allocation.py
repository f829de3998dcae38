"""Final ranks: how many modes each layer keeps at the freeze."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .init import generator_for

Shape = tuple[int, int]


def fitting_multiple(multiple_of: int, rank: int, limit: int | None = None) -> int:
    """``multiple_of``, or the half, quarter ... of it that is not above ``rank`` and to which ``rank`` can be rounded
    up without going beyond ``limit``; at least 1."""
    while multiple_of > max(rank, 1) or (limit is not None and -(-rank // multiple_of) * multiple_of > limit >= rank):
        multiple_of //= 2
    return multiple_of


def rounded_ranks(
    ranks: Mapping[str, int], sigmas: Mapping[str, Tensor], shapes: Mapping[str, Shape], multiple_of: int
) -> dict[str, int]:
    """Each rank rounded up or down to a multiple, with about as many parameters in all and the least energy discarded.

    All are rounded down, then those are raised that save the most energy ``sum sigma^2`` for each parameter, as long as
    the parameters are no more than those of ``ranks``. A rank below ``multiple_of`` is rounded to a half, quarter ...
    of it, so that none is more than doubled and none falls to nothing; so is one that could not be rounded up.

    Args:
        sigmas: layer -> ``(R,)`` singular values, descending; no layer gets more than its ``R``.
    """
    groups = {name: fitting_multiple(multiple_of, rank, len(sigmas[name])) for name, rank in ranks.items()}
    least = {name: ranks[name] - ranks[name] % group for name, group in groups.items()}
    most = {name: -(-ranks[name] // group) * group for name, group in groups.items()}
    budget = sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    return _spend(budget, sigmas, shapes, groups, least, most)


def uniform_ranks(
    ranks: Mapping[str, int], shapes: Mapping[str, Shape], caps: Mapping[str, int], multiple_of: int
) -> dict[str, int]:
    """One rank for all layers with about as many parameters as ``ranks``: their mean weighted by ``in + out``, rounded
    to ``multiple_of`` (to a half, quarter ... of it where it is less than that), at most the smallest of ``caps``."""
    weights = {name: sum(shapes[name]) for name in ranks}
    mean = sum(ranks[name] * weights[name] for name in ranks) / sum(weights.values())
    group = fitting_multiple(multiple_of, round(mean))
    rank = round(mean / group) * group
    return dict.fromkeys(ranks, min(rank, *(caps[name] for name in ranks)))


def budget_ranks(
    sigmas: Mapping[str, Tensor], shapes: Mapping[str, Shape], fraction: float, multiple_of: int
) -> dict[str, int]:
    """Ranks that discard the least energy, over all layers together, within a budget of parameters.

    Modes are taken in groups of ``multiple_of``, each time the group that saves the most energy ``sum sigma^2`` for
    each of its ``in + out`` parameters; every layer keeps at least one group. Where one group in every layer is already
    more than the budget, groups are halved until it is not: the budget is kept, at the cost of ranks that suit the
    machine less.

    Args:
        sigmas: layer -> ``(R,)`` singular values, descending; no layer gets more than its ``R``.
        fraction: the budget, as a fraction of the dense parameters ``in * out`` of these layers.

    Raises:
        ValueError: rank 1 in every layer is already more, see ``least_fraction``.
    """
    shapes = {name: shapes[name] for name in sigmas}
    least = least_fraction(shapes)
    if fraction < least:
        raise ValueError(f"a budget of {fraction:g} is below {least:g}, which rank 1 in every layer takes")
    budget = fraction * _dense_parameters(shapes)
    while True:
        groups = {name: fitting_multiple(multiple_of, len(sigma)) for name, sigma in sigmas.items()}
        if multiple_of == 1 or sum(group * sum(shapes[name]) for name, group in groups.items()) <= budget:
            break
        multiple_of //= 2
    return _spend(budget, sigmas, shapes, groups, groups, {name: len(sigma) for name, sigma in sigmas.items()})


def random_ranks(
    shapes: Mapping[str, Shape], caps: Mapping[str, int], fraction: float, multiple_of: int, seed: int
) -> dict[str, int]:
    """Ranks drawn at random within a budget of parameters: the control of ranks that a rule found.

    They are the ``budget_ranks`` of random spectra: what the ``k``-th mode of a layer saves for each parameter is
    ``h / k``, where ``h`` is drawn for each layer, uniformly between 0 and 1. So ranks are about proportional to ``h``.

    Args:
        caps: layer -> the highest rank that it can have.
        fraction: the budget, as a fraction of the dense parameters ``in * out`` of these layers.

    Raises:
        ValueError: rank 1 in every layer is already more, see ``least_fraction``.
    """
    sigmas = {}
    for name, shape in shapes.items():
        height = torch.rand((), generator=generator_for(seed, "random ranks", name), dtype=torch.float64)
        sigmas[name] = (height * sum(shape) / torch.arange(1, caps[name] + 1)).sqrt()
    return budget_ranks(sigmas, shapes, fraction, multiple_of)


def least_fraction(shapes: Mapping[str, Shape]) -> float:
    """Parameters of rank 1 in every layer, as a fraction of the dense ones: no smaller budget can be kept."""
    return sum(map(sum, shapes.values())) / _dense_parameters(shapes)


def _dense_parameters(shapes: Mapping[str, Shape]) -> int:
    return sum(out * in_ for out, in_ in shapes.values())


def _spend(
    budget: float,
    sigmas: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    groups: Mapping[str, int],
    least: Mapping[str, int],
    most: Mapping[str, int],
) -> dict[str, int]:
    """Raise ranks from ``least`` to at most ``most`` by groups, the most energy for each parameter first.

    A layer whose next group does not fit the rest of the budget stops there.
    """
    ranks = dict(least)
    budget -= sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    candidates = []
    for position, (name, sigma) in enumerate(sigmas.items()):
        cost = sum(shapes[name])
        for start in range(least[name], most[name] - groups[name] + 1, groups[name]):
            energy = float(sigma[start : start + groups[name]].square().sum())
            candidates.append((-energy / (cost * groups[name]), start, position, name))
    # Within a layer the groups come in descending order; equal ones in theirs, so that no group is taken before its
    # predecessor.
    stopped: set[str] = set()
    for _, _, _, name in sorted(candidates):
        cost = groups[name] * sum(shapes[name])
        if name in stopped or cost > budget:
            stopped.add(name)
            continue
        ranks[name] += groups[name]
        budget -= cost
    return ranks


class Spectrum(NamedTuple):
    """What an allocation sees of a layer.

    Attributes:
        sigma: ``(R,)`` singular values of the product, descending.
        shape: ``(out, in)``.
        cap: the highest rank that it may have.
        rank: that the rule found.
    """

    sigma: Tensor
    shape: Shape
    cap: int
    rank: int

    @property
    def allowed(self) -> Tensor:
        """The singular values up to the cap."""
        return self.sigma[: self.cap]


@dataclass(frozen=True)
class Allocation:
    """How ranks are divided among layers at the freeze. A new one is an object of this class and a line in
    ``ALLOCATIONS``.

    Attributes:
        ranks: layer -> spectrum, the multiple to round to, the budget as a fraction of the dense parameters, and the
            seed of the run -> layer -> rank.
        uses_budget: whether the ranks spend a budget of parameters, whatever ranks the rule found.
    """

    ranks: Callable[[Mapping[str, Spectrum], int, float, int], dict[str, int]]
    uses_budget: bool = False


def _per_layer(layers: Mapping[str, Spectrum], multiple_of: int, budget: float, seed: int) -> dict[str, int]:
    ranks = {name: layer.rank for name, layer in layers.items()}
    return rounded_ranks(ranks, _allowed(layers), _shapes(layers), multiple_of)


def _uniform(layers: Mapping[str, Spectrum], multiple_of: int, budget: float, seed: int) -> dict[str, int]:
    ranks = {name: layer.rank for name, layer in layers.items()}
    caps = {name: layer.cap for name, layer in layers.items()}
    return uniform_ranks(ranks, _shapes(layers), caps, multiple_of)


def _budget(layers: Mapping[str, Spectrum], multiple_of: int, budget: float, seed: int) -> dict[str, int]:
    return budget_ranks(_allowed(layers), _shapes(layers), budget, multiple_of)


def _random(layers: Mapping[str, Spectrum], multiple_of: int, budget: float, seed: int) -> dict[str, int]:
    caps = {name: len(sigma) for name, sigma in _allowed(layers).items()}
    return random_ranks(_shapes(layers), caps, budget, multiple_of, seed)


def _allowed(layers: Mapping[str, Spectrum]) -> dict[str, Tensor]:
    return {name: layer.allowed for name, layer in layers.items()}


def _shapes(layers: Mapping[str, Spectrum]) -> dict[str, Shape]:
    return {name: layer.shape for name, layer in layers.items()}


ALLOCATIONS: dict[str, Allocation] = {
    "per_layer": Allocation(_per_layer),
    "uniform": Allocation(_uniform),
    "budget": Allocation(_budget, uses_budget=True),
    "random": Allocation(_random, uses_budget=True),
}
"""``lowrank.final`` -> allocation."""
