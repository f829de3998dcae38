"""Allocation of the final ranks: the number of modes that each layer keeps at the freeze."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .init import generator_for

Shape = tuple[int, int]


def fitting_multiple(multiple_of: int, rank: int, limit: int | None = None) -> int:
    """Halve ``multiple_of`` until it is at most ``rank`` and ``rank`` can be rounded up to a multiple of it.

    The rounded rank must not exceed ``limit``, unless ``rank`` itself does. The result is at least 1.
    """
    while multiple_of > max(rank, 1) or (limit is not None and -(-rank // multiple_of) * multiple_of > limit >= rank):
        multiple_of //= 2
    return multiple_of


def rounded_ranks(
    ranks: Mapping[str, int], sigmas: Mapping[str, Tensor], shapes: Mapping[str, Shape], multiple_of: int
) -> dict[str, int]:
    """Round each rank up or down to a multiple at about the same total number of parameters.

    All ranks are first rounded down. Layers are then rounded up in descending order of the energy ``sum sigma^2`` saved
    per parameter, as long as the total does not exceed the number of parameters of ``ranks``. A rank that is below
    ``multiple_of``, or that cannot be rounded up within its ``R``, is rounded to a multiple of a half, a quarter, ...
    of ``multiple_of``. Thus no rank is more than doubled and no positive rank becomes 0.

    Args:
        ranks: layer -> rank.
        sigmas: layer -> ``(R,)`` singular values, descending. No layer gets a rank above its ``R``.
        shapes: layer -> ``(out, in)``.
    """
    groups = {name: fitting_multiple(multiple_of, rank, len(sigmas[name])) for name, rank in ranks.items()}
    least = {name: ranks[name] - ranks[name] % group for name, group in groups.items()}
    most = {name: -(-ranks[name] // group) * group for name, group in groups.items()}
    budget = sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    return _spend(budget, sigmas, shapes, groups, least, most)


def uniform_ranks(
    ranks: Mapping[str, int], shapes: Mapping[str, Shape], caps: Mapping[str, int], multiple_of: int
) -> dict[str, int]:
    """Return the same rank for all layers, with about as many parameters in total as ``ranks``.

    The rank is the mean of ``ranks`` weighted by ``in + out``, rounded to a multiple of ``multiple_of`` and limited to
    the smallest of ``caps``. If the mean is below ``multiple_of``, it is rounded to a multiple of a half, a quarter,
    ... of ``multiple_of``.
    """
    weights = {name: sum(shapes[name]) for name in ranks}
    mean = sum(ranks[name] * weights[name] for name in ranks) / sum(weights.values())
    group = fitting_multiple(multiple_of, round(mean))
    rank = round(mean / group) * group
    return dict.fromkeys(ranks, min(rank, *(caps[name] for name in ranks)))


def budget_ranks(
    sigmas: Mapping[str, Tensor], shapes: Mapping[str, Shape], fraction: float, multiple_of: int
) -> dict[str, int]:
    """Return ranks that discard the least total energy within a budget of parameters.

    The allocation is greedy. It adds modes in groups of ``multiple_of``, first the group that saves the most energy
    ``sum sigma^2`` per parameter; a mode has ``in + out`` parameters. Every layer keeps at least one group. If one
    group in every layer exceeds the budget, the group size is halved until it does not.

    Args:
        sigmas: layer -> ``(R,)`` singular values, descending. No layer gets a rank above its ``R``.
        shapes: layer -> ``(out, in)``.
        fraction: the budget as a fraction of the dense parameters ``in * out`` of these layers.
        multiple_of: group size.

    Raises:
        ValueError: rank 1 in every layer exceeds the budget, see ``least_fraction``.
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
    """Return random ranks within a budget of parameters, as a control for ranks derived from spectra.

    The ranks are the ``budget_ranks`` of random spectra. The ``k``-th mode of a layer saves the energy ``h / k`` per
    parameter, with one ``h`` per layer drawn uniformly from [0, 1). The ranks are therefore roughly proportional to
    ``h``.

    Args:
        shapes: layer -> ``(out, in)``.
        caps: layer -> largest rank allowed.
        fraction: the budget as a fraction of the dense parameters ``in * out`` of these layers.
        multiple_of: group size, as in ``budget_ranks``.

    Raises:
        ValueError: rank 1 in every layer exceeds the budget, see ``least_fraction``.
    """
    sigmas = {}
    for name, shape in shapes.items():
        height = torch.rand((), generator=generator_for(seed, "random ranks", name), dtype=torch.float64)
        sigmas[name] = (height * sum(shape) / torch.arange(1, caps[name] + 1)).sqrt()
    return budget_ranks(sigmas, shapes, fraction, multiple_of)


def affordable_rank(shape: Shape, fraction: float) -> int:
    """Return the largest rank of a layer ``(out, in)`` whose factors have at most ``fraction * out * in`` parameters.

    It is 0 if rank 1 has more.
    """
    out_features, in_features = shape
    return int(fraction * out_features * in_features / (out_features + in_features) + 1e-9)


def least_fraction(shapes: Mapping[str, Shape]) -> float:
    """Return the smallest feasible budget: rank 1 in every layer, as a fraction of the dense parameters."""
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
    """Raise ranks from ``least`` to at most ``most`` in groups, in descending order of energy saved per parameter.

    A layer is not raised further once its next group exceeds the remaining budget.
    """
    ranks = dict(least)
    budget -= sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    candidates = []
    for position, (name, sigma) in enumerate(sigmas.items()):
        cost = sum(shapes[name])
        for start in range(least[name], most[name] - groups[name] + 1, groups[name]):
            energy = float(sigma[start : start + groups[name]].square().sum())
            candidates.append((-energy / (cost * groups[name]), start, position, name))
    # The groups of a layer are in descending order of energy, and the start index breaks ties. No group is therefore
    # taken before its predecessor.
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
    """The inputs of an allocation for one layer.

    Attributes:
        sigma: ``(R,)`` singular values of the product of the factors, descending.
        shape: ``(out, in)``.
        cap: largest rank allowed.
        rank: rank chosen by the rule.
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
    """A way to assign the final ranks. To add one, create an object of this class and register it in ``ALLOCATIONS``.

    Attributes:
        ranks: function ``(spectra, multiple_of, budget, seed) -> {layer: rank}``. ``spectra`` maps layers to
            ``Spectrum``; ``budget`` is a fraction of the dense parameters; ``seed`` is the seed of the run.
        uses_budget: whether the ranks depend on the budget and not on the ranks chosen by the rule.
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
"""Value of the setting ``lowrank.final`` -> allocation."""
