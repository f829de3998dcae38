"""Rank methods: they decide when ranks change and to what, and track the null ranks."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache, partial

from torch import Tensor

from ..lowrank.allocation import ALLOCATIONS, Spectrum
from ..lowrank.criterion import Decision, explained_ratio
from ..lowrank.init import generator_for, start_factors
from ..lowrank.null import NullRanks, Shape
from ..lowrank.spectrum import Factors
from .policy import Action
from .settings import LowRankSettings
from .stable_rank import StableRanks
from .starts import finds_ranks


class RankMethod:
    """Decides when ranks change and to what, based on the explained ratio (arXiv 2306.11250).

    A method works only with singular values and step numbers. ``RankController`` measures the spectra, checks that the
    processes agree, and reshapes the model. To add a method, write a subclass, set ``grows`` and ``freezes``, and
    register it in ``METHODS``.

    Args:
        settings: section ``lowrank``.
        shapes: layer -> ``(out, in)``.
        seed: seed of the run.
        steps: number of optimizer steps of the run.
        multiple: at the freeze, ranks are rounded to a multiple of this.

    Attributes:
        rule: derives a rank from singular values.
        policy: the schedule.
        null: the null ranks so far.
        measures_update: whether the rule uses the spectrum of the update since initialisation, not of the product.
        stable_ranks: stable ranks of dense layers, if these are factored once they have settled, otherwise None.
    """

    grows, freezes = True, False
    """Whether ranks can change, and whether they are frozen at some step."""

    def __init__(
        self, settings: LowRankSettings, shapes: Mapping[str, Shape], seed: int, steps: int, multiple: int
    ) -> None:
        self.settings, self.shapes, self.seed, self.multiple = settings, shapes, seed, multiple
        self.rule, self.policy, self.measures_update = settings.rule, settings.policy(steps), settings.measures_update
        starts_random = not settings.starts_at_zero and not settings.dense_fraction
        at_initialisation: Callable[[int, int, int], Factors] | None = None
        if starts_random and not self.measures_update:
            at_initialisation = partial(untrained_factors, settings, seed)
            if settings.init in ("spectral", "spectral_ones"):  # cached because each draw takes a dense SVD
                at_initialisation = cache(at_initialisation)
        opens_at_random = settings.growth_init == "published"
        self.null = NullRanks(
            self.rule, settings.initial_rank, seed, at_initialisation, opens_at_random=opens_at_random
        )
        self.stable_ranks: StableRanks | None = None
        if settings.follows_stable_ranks:
            self.stable_ranks = StableRanks(shapes, settings.stable_rank_tolerance, settings.stable_rank_window)

    def due(self, step: int, checks_without_growth: int, *, dense: bool) -> Action | None:
        """Return the action due after ``step`` optimizer steps, or None. The ranks must not be frozen yet.

        Args:
            step: number of completed optimizer steps.
            checks_without_growth: number of consecutive decisions, up to now, in which no layer grew.
            dense: whether the layers are dense.
        """
        return self.policy.action(step, checks_without_growth, dense=dense)

    @property
    def on_settled(self) -> Action:
        """The action once the stable ranks of dense layers have settled."""
        return "freeze" if self.settings.freezes and self.settings.freeze_step is None else "factorise"

    def decide(self, layer: str, sigma: Tensor, rank: int | None, action: Action) -> Decision:
        """Decide the rank of one layer.

        Args:
            layer: name of the layer.
            sigma: ``(R,)`` float64 singular values, descending, bitwise equal on all processes.
            rank: current active rank. None if the layer is dense.
            action: the action that is due.
        """
        dimension = min(self.shapes[layer])
        if rank is not None:
            return self.rule.decide(sigma, rank, dimension, may_shrink=self.may_shrink(action))
        decision = self.rule.decide(sigma, dimension, dimension, may_shrink=True)
        return decision if self.settings.grows else self.with_rank(decision, self._fixed(layer, sigma), layer, sigma)

    def _fixed(self, layer: str, sigma: Tensor) -> int:
        """Return the constant rank of a layer that has been dense."""
        dimension = min(self.shapes[layer])
        if not finds_ranks(self.settings):
            return self.settings.rank_of(self.shapes[layer])
        if self.settings.initial_energy is not None:
            rule = dataclasses.replace(self.rule, threshold=self.settings.initial_energy, criterion="energy")
            return rule.decide(sigma, dimension, dimension, may_shrink=True).after
        assert self.stable_ranks
        rank = self.stable_ranks.rank(layer)
        return min(rank + -rank % self.rule.multiple_of, self.rule.cap(dimension))

    def final_ranks(self, product: Mapping[str, Tensor], decisions: Mapping[str, Decision]) -> dict[str, int]:
        """Return the ranks after the freeze.

        Args:
            product: layer -> ``(R,)`` singular values of the product of the factors, which the freeze truncates.
            decisions: layer -> result of ``decide``.
        """
        spectra = {
            name: Spectrum(sigma, self.shapes[name], self.rule.cap(min(self.shapes[name])), decisions[name].after)
            for name, sigma in product.items()
        }
        allocation = ALLOCATIONS[self.settings.final]
        return allocation.ranks(spectra, self.multiple, self.settings.final_budget, self.seed)

    def modes(self, layer: str, rank: int, action: Action) -> int:
        """Return the number of modes of a layer with this rank. The freeze removes the buffer."""
        return rank if action == "freeze" else self.rule.modes(rank, min(self.shapes[layer]))

    def may_shrink(self, action: Action | None) -> bool:
        """Return whether a decision may lower ranks."""
        return action == "freeze" and self.settings.shrinks

    def with_rank(self, decision: Decision, rank: int, layer: str, sigma: Tensor) -> Decision:
        """Return a copy of a decision with another rank and its explained ratio."""
        ratio = explained_ratio(sigma, min(self.shapes[layer]), self.rule.criterion)
        return dataclasses.replace(decision, after=rank, reached=float(ratio[min(rank, len(ratio) - 1)]))

    def advance_null(self, action: Action, *, was_dense: bool) -> None:
        """Apply the rule to untrained factors, or to untrained dense weights if the layers were dense."""
        shapes = set(self.shapes.values())
        if not was_dense:
            self.null.advance(shapes, may_shrink=self.may_shrink(action))
        elif self.settings.grows:
            self.null.start_dense(shapes)


def untrained_factors(settings: LowRankSettings, seed: int, out_features: int, in_features: int, modes: int) -> Factors:
    """Draw factors of a shape at initialisation, with ``std`` 1 because the explained ratio is scale-invariant."""
    generator = generator_for(seed, "null born", out_features, in_features)
    init = settings.init if settings.base == "none" else "orthogonal"
    return start_factors(out_features, in_features, modes, init, 1.0, generator)


class FixedMethod(RankMethod):
    """Factors of constant rank."""

    grows = False


class GrowingMethod(RankMethod):
    """Factors whose rank may grow until the end."""


class GrowThenFreezeMethod(RankMethod):
    """Factors whose rank grows during the warm-up and is then frozen."""

    freezes = True


METHODS: dict[str, type[RankMethod]] = {
    "fixed": FixedMethod,
    "inrank": GrowingMethod,
    "efficient": GrowThenFreezeMethod,
}
"""Value of the setting ``lowrank.mode`` -> method. ``full`` has none."""
