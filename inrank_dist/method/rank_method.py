"""What a method decides: when ranks change, to what, and what the same rule finds where nothing was learned."""

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


class RankMethod:
    """Decides when ranks change and to what, by the explained ratio (arXiv 2306.11250), and keeps the null ranks.

    Subclasses set ``grows`` and ``freezes``. A new method is a subclass and a line in ``METHODS``. It sees numbers
    only; ``RankController`` measures, lets the processes agree, and reshapes.

    Args:
        settings: section ``lowrank``.
        shapes: layer -> ``(out, in)``.
        seed: of the run.
        steps: optimizer steps of the run.
        multiple: ranks are rounded to a multiple of this at the freeze.

    Attributes:
        rule: from singular values to a rank.
        policy: the calendar.
        null: the null ranks so far.
        measures_update: whether ``sigma`` is the spectrum of what was learned since the start, not of the product.
    """

    grows, freezes = True, False
    """Whether ranks can change, and whether they are frozen at some step."""

    def __init__(
        self, settings: LowRankSettings, shapes: Mapping[str, Shape], seed: int, steps: int, multiple: int
    ) -> None:
        self.settings, self.shapes, self.seed, self.multiple = settings, shapes, seed, multiple
        self.rule, self.policy, self.measures_update = settings.rule, settings.policy(steps), settings.measures_update
        starts_random = settings.base == "none" and not settings.dense_fraction
        at_initialisation: Callable[[int, int, int], Factors] | None = None
        if starts_random and not self.measures_update:
            at_initialisation = partial(untrained_factors, settings, seed)
            if settings.init in ("spectral", "spectral_ones"):  # a dense SVD a draw: drawn once and kept
                at_initialisation = cache(at_initialisation)
        opens_at_random = settings.growth_init == "published"
        self.null = NullRanks(
            self.rule, settings.initial_rank, seed, at_initialisation, opens_at_random=opens_at_random
        )

    def due(self, step: int, checks_without_growth: int, *, dense: bool) -> Action | None:
        """What is due after ``step`` optimizer steps, as long as the ranks are not frozen.

        Args:
            checks_without_growth: in a row, up to now.
            dense: whether the layers are dense; also where a resumed run has fewer dense steps than it had.
        """
        action = self.policy.action(step, checks_without_growth)
        if dense:
            return action if action == "freeze" or step < self.policy.dense_steps else "factorise"
        return None if action == "factorise" else action

    def decide(self, layer: str, sigma: Tensor, rank: int | None, action: Action) -> Decision:
        """The rank of one layer.

        Args:
            sigma: ``(R,)`` float64 singular values, descending, the same bits on every process.
            rank: present active rank; None: the layer is dense.
        """
        dimension = min(self.shapes[layer])
        if rank is not None:
            return self.rule.decide(sigma, rank, dimension, may_shrink=self.may_shrink(action))
        decision = self.rule.decide(sigma, dimension, dimension, may_shrink=True)
        return decision if self.settings.grows else self.with_rank(decision, self.settings.initial_rank, layer, sigma)

    def final_ranks(self, product: Mapping[str, Tensor], decisions: Mapping[str, Decision]) -> dict[str, int]:
        """Ranks after the freeze.

        Args:
            product: singular values of the products of the factors, which the freeze truncates.
            decisions: of ``decide``.
        """
        spectra = {
            name: Spectrum(sigma, self.shapes[name], self.rule.cap(min(self.shapes[name])), decisions[name].after)
            for name, sigma in product.items()
        }
        allocation = ALLOCATIONS[self.settings.final]
        return allocation.ranks(spectra, self.multiple, self.settings.final_budget, self.seed)

    def modes(self, layer: str, rank: int, action: Action) -> int:
        """Columns that a layer of this rank has: with a buffer, until the freeze."""
        return rank if action == "freeze" else self.rule.modes(rank, min(self.shapes[layer]))

    def may_shrink(self, action: Action | None) -> bool:
        """Whether a decision may lower ranks."""
        return action == "freeze" and self.settings.shrinks

    def with_rank(self, decision: Decision, rank: int, layer: str, sigma: Tensor) -> Decision:
        """A decision with another rank than the rule's."""
        ratio = explained_ratio(sigma, min(self.shapes[layer]), self.rule.criterion)
        return dataclasses.replace(decision, after=rank, reached=float(ratio[min(rank, len(ratio) - 1)]))

    def advance_null(self, action: Action, *, was_dense: bool) -> None:
        """Apply the rule to untrained factors as well."""
        shapes = set(self.shapes.values())
        if not was_dense:
            self.null.advance(shapes, may_shrink=self.may_shrink(action))
        elif self.settings.grows:
            self.null.start_dense(shapes)


def untrained_factors(settings: LowRankSettings, seed: int, out_features: int, in_features: int, modes: int) -> Factors:
    """Factors of a shape at initialisation; the explained ratio does not see their scale."""
    generator = generator_for(seed, "null born", out_features, in_features)
    return start_factors(out_features, in_features, modes, settings.init, 1.0, generator)


class FixedMethod(RankMethod):
    """Factors of constant rank."""

    grows = False


class GrowingMethod(RankMethod):
    """The rank may grow to the end."""


class GrowThenFreezeMethod(RankMethod):
    """The rank grows during the warm-up and is then frozen."""

    freezes = True


METHODS: dict[str, type[RankMethod]] = {
    "fixed": FixedMethod,
    "inrank": GrowingMethod,
    "efficient": GrowThenFreezeMethod,
}
"""``lowrank.mode`` -> method; ``full`` has none."""
