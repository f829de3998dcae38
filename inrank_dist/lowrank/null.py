"""The null rank: the rank that the rule finds in untrained factors."""

from collections.abc import Callable

import torch
from torch import Tensor

from .criterion import RankRule
from .init import generator_for
from .spectrum import Factors, Grams, dense_singular_values, gram_matrices, singular_values

Shape = tuple[int, int]
"""``(out, in)`` of a layer."""


class NullRanks:
    """The ranks that the rule of a run finds in untrained factors of the same shapes after the same number of checks.

    If one factor is zero at initialisation, all columns are i.i.d. Gaussian. Otherwise the first columns are those at
    initialisation. Columns appended by growth are then Gaussian if growth initialises both factors randomly, and
    omitted if it initialises ``U`` with zeros.

    There is one sample per shape. Gaussian columns are redrawn at each check. A shape and its transpose share a sample
    because their products have the same spectrum.

    Args:
        rule: the rule of the run.
        initial_rank: the initial rank of the run.
        seed: the seed of the run.
        initial: ``initial(out, in, R)`` returns the factors of a layer at initialisation. None if one factor is zero.
        opens_at_random: whether growth initialises both factors of a new mode randomly. Used only with ``initial``.
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
        self._spectra: dict[Shape, Tensor] = {}

    def advance(self, shapes: set[Shape], *, may_shrink: bool = False) -> None:
        """Apply the rule once more to every shape. Every call must pass the same ``shapes``."""
        for shape in sorted({null_shape(shape) for shape in shapes}):
            sigma = singular_values(self._grams(shape))
            decision = self.rule.decide(sigma, self.of(shape), min(shape), may_shrink=may_shrink)
            self._ranks[shape], self._spectra[shape] = decision.after, sigma
        self.checks += 1

    def start_dense(self, shapes: set[Shape]) -> None:
        """Apply the rule to an i.i.d. Gaussian dense weight of every shape."""
        for shape in sorted({null_shape(shape) for shape in shapes}):
            weight = torch.randn(shape, generator=generator_for(self.seed, "null dense", *shape), dtype=torch.float64)
            sigma = dense_singular_values(weight)
            self._ranks[shape] = self.rule.decide(sigma, min(shape), min(shape), may_shrink=True).after
            self._spectra[shape] = sigma
        self.checks += 1

    def of(self, shape: Shape) -> int:
        """Return the null rank of a shape after the checks so far."""
        return self._ranks.get(null_shape(shape), self.initial_rank)

    def spectrum(self, shape: Shape) -> Tensor | None:
        """Return the singular values of the last check of a shape, or None before the first check of this process.

        They are ``(R,)`` float64, descending, and scaled to a Frobenius norm of 1.
        """
        sigma = self._spectra.get(null_shape(shape))
        return None if sigma is None else sigma / sigma.norm()

    def _grams(self, shape: Shape) -> Grams:
        modes = self.rule.modes(self.of(shape), min(shape))
        generator = generator_for(self.seed, "null", *shape, self.checks)
        if self.initial is None:
            U, V = (torch.randn(n, modes, generator=generator) for n in shape)
            factors = Factors(U, V)
        else:
            factors = self.initial(*shape, min(self.rule.modes(self.initial_rank, min(shape)), modes))
            if self.opens_at_random:
                U, V = (_widen(factor, modes, generator) for factor in (factors.U, factors.V))
                factors = Factors(U, V)
        return gram_matrices({"null": factors}, lambda total: None)["null"]

    def state_dict(self) -> dict:
        """Return the state as JSON-serialisable values."""
        return {"checks": self.checks, "ranks": [[*shape, rank] for shape, rank in self._ranks.items()]}

    def load_state_dict(self, state: dict) -> None:
        self.checks = state["checks"]
        self._ranks = {(out, in_): rank for out, in_, rank in state["ranks"]}


def null_shape(shape: Shape) -> Shape:
    """Return the shape whose null rank a shape shares: the larger dimension first."""
    return max(shape), min(shape)


def _widen(factor: Tensor, modes: int, generator: torch.Generator) -> Tensor:
    """Append Gaussian columns with the root mean square of ``factor``, up to ``modes`` columns."""
    fresh = torch.randn(factor.shape[0], modes - factor.shape[1], generator=generator)
    return torch.cat([factor, fresh * factor.square().mean().sqrt()], dim=1)
