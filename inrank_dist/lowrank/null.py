"""The null rank: what the rule answers when nothing was learned."""

from collections.abc import Callable

import torch

from .criterion import RankRule
from .init import generator_for
from .spectrum import Factors, Grams, gram_matrices, singular_values

Shape = tuple[int, int]
"""``(out, in)`` of a layer."""


class NullRanks:
    """Runs the same rule, as often, on untrained factors of the same shapes.

    All columns are i.i.d. Gaussian where one factor is zero at initialisation. Otherwise the first columns are those of
    the initialisation, and those that growth appends are Gaussian if it opens them at random and add nothing if it
    opens them at zero. One sample a shape, drawn anew at each check; transposed shapes share theirs, since the product
    has the same spectrum.

    Args:
        rule: the rule of the run.
        initial_rank: where both the run and its null start.
        seed: of the run.
        initial: ``initial(out, in, R) -> Factors`` of a layer at initialisation; None where one factor is zero then.
        opens_at_random: whether growth opens both factors of a new mode at random (``initial`` given).
    """

    def __init__(
        self,
        rule: RankRule,
        initial_rank: int,
        seed: int,
        initial: Callable[[int, int, int], Factors] | None = None,
        *,
        opens_at_random: bool = True,
    ) -> None:
        self.rule, self.initial_rank, self.seed, self.initial = rule, initial_rank, seed, initial
        self.opens_at_random = opens_at_random
        self.checks = 0
        self._ranks: dict[Shape, int] = {}

    def advance(self, shapes: set[Shape], *, may_shrink: bool = False) -> None:
        """Apply the rule once more to every shape. ``shapes`` is the same set at each call."""
        for shape in sorted({_tall(shape) for shape in shapes}):
            sigma = singular_values(self._grams(shape))
            decision = self.rule.decide(sigma, self.of(shape), min(shape), may_shrink=may_shrink)
            self._ranks[shape] = decision.after
        self.checks += 1

    def start_dense(self, shapes: set[Shape]) -> None:
        """Apply the rule for dense layers to untrained ones, i.i.d. Gaussian, of every shape."""
        for shape in sorted({_tall(shape) for shape in shapes}):
            weight = torch.randn(shape, generator=generator_for(self.seed, "null dense", *shape), dtype=torch.float64)
            sigma = torch.linalg.eigvalsh(weight.T @ weight).clamp(min=0).sqrt().flip(0)
            self._ranks[shape] = self.rule.decide(sigma, min(shape), min(shape), may_shrink=True).after
        self.checks += 1

    def of(self, shape: Shape) -> int:
        """Null rank of a shape after the checks so far."""
        return self._ranks.get(_tall(shape), self.initial_rank)

    def _grams(self, shape: Shape) -> Grams:
        modes = self.rule.modes(self.of(shape), min(shape))
        generator = generator_for(self.seed, "null", *shape, self.checks)
        if self.initial is None:
            factors = Factors(*(torch.randn(n, modes, generator=generator) for n in shape))
        else:
            factors = self.initial(*shape, min(self.rule.modes(self.initial_rank, min(shape)), modes))
            if self.opens_at_random:
                factors = Factors(*(_widen(factor, modes, generator) for factor in (factors.U, factors.V)))
        return gram_matrices({"null": factors}, lambda total: None)["null"]

    def state_dict(self) -> dict:
        """JSON-able state; ``load_state_dict`` continues from it."""
        return {"checks": self.checks, "ranks": [[*shape, rank] for shape, rank in self._ranks.items()]}

    def load_state_dict(self, state: dict) -> None:
        self.checks = state["checks"]
        self._ranks = {(out, in_): rank for out, in_, rank in state["ranks"]}


def _tall(shape: Shape) -> Shape:
    return max(shape), min(shape)


def _widen(factor: torch.Tensor, modes: int, generator: torch.Generator) -> torch.Tensor:
    """Append Gaussian columns of the same root mean square until there are ``modes``."""
    fresh = torch.randn(factor.shape[0], modes - factor.shape[1], generator=generator)
    return torch.cat([factor, fresh * factor.square().mean().sqrt()], dim=1)
