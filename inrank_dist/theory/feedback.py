"""Feedback alignment factorises a matrix as gradient descent does, if the rank suffices, and not if it does not.

Source: Garg and Vempala, How and When Random Feedback Works: A Case Study of Low-Rank Matrix Factorization, arXiv
2111.08706. ``min |Z W - Y|_F`` over ``Z: (n, r)`` and ``W: (r, m)``. Gradient descent moves ``W`` along
``Z^T (Y - Z W)``; feedback alignment puts a fixed random ``B: (n, r)`` in the place of ``Z`` there.

Derived here: where feedback alignment rests, ``B^T (Y - Z W) = 0`` and ``(Y - Z W) W^T = 0``. So the rows of ``W``
span those of ``B^T Y``, and the error is ``|Y (I - P)|_F`` with ``P`` the projection onto that span: feedback alignment
finds a random sketch of ``Y``. Its error is the least possible if ``rank(Y) <= r``, or if all singular values of ``Y``
that are not zero are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..lowrank.init import generator_for
from ..report.plot import Line, Plot
from .experiment import Cell, Claim, Experiment, Progress, Result, Table, curve
from .linear import orthonormal


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        size: ``n = m``.
        rank: ``r``.
        extra: ``r`` less ``rank(Y)`` in the case with rank to spare.
        tail: singular values of ``Y`` after the first ``r``, which are 1, where the rank does not suffice.
        tail_length: how many there are.
        start: scale of the random start.
        rate: of both methods.
    """

    size: int = 40
    rank: int = 5
    extra: int = 3
    tail: float = 0.1
    tail_length: int = 25
    start: float = 0.01
    rate: float = 0.1
    steps: int = 5000
    every: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)

    def cases(self) -> dict[str, Tensor]:
        """Name -> singular values of ``Y``."""
        ones = torch.ones(self.size, dtype=torch.float64)
        tail = torch.cat([ones[: self.rank], self.tail * ones[: self.tail_length]])
        return {
            "sufficient": ones[: self.rank],
            "to spare": ones[: self.rank - self.extra],
            "insufficient": tail,
            "flat": ones,
        }


@dataclass(frozen=True)
class Factors:
    """Where one method ended.

    Attributes:
        errors: ``|Z W - Y|_F / |Y|_F``, every ``Settings.every`` steps from the start on.
        alignments: the cosine of ``Z`` and ``B``, as often.
    """

    Z: Tensor
    W: Tensor
    errors: list[float]
    alignments: list[float]

    @property
    def error(self) -> float:
        """The last error."""
        return self.errors[-1]


def factorise(target: Tensor, feedback: Tensor, settings: Settings, seed: int, aligned: bool) -> Factors:
    """Factorise ``Y: (n, m)`` from a small random start.

    Args:
        feedback: ``B: (n, r)``.
        aligned: whether to use it (feedback alignment) or ``Z`` (gradient descent).
    """
    (n, m), r = target.shape, feedback.shape[1]
    generator = generator_for(seed, "feedback", "start")
    Z = settings.start * torch.randn(n, r, generator=generator, dtype=torch.float64) / n**0.5
    W = settings.start * torch.randn(r, m, generator=generator, dtype=torch.float64) / m**0.5
    scale, errors, alignments = float(target.norm()), [], []
    for step in range(settings.steps + 1):
        residual = Z @ W - target
        if step % settings.every == 0:
            errors.append(float(residual.norm()) / scale)
            alignments.append(cosine(Z, feedback))
        backward = feedback if aligned else Z
        Z, W = Z - settings.rate * residual @ W.T, W - settings.rate * backward.T @ residual
    return Factors(Z, W, errors, alignments)


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two matrices as vectors."""
    return float((a * b).sum() / (a.norm() * b.norm()))


def sketch_error(target: Tensor, feedback: Tensor) -> float:
    """``|Y (I - P)|_F / |Y|_F``, ``P`` onto the rows of ``B^T Y``."""
    rows, _ = torch.linalg.qr((feedback.T @ target).T)
    return float((target - target @ rows @ rows.T).norm() / target.norm())


def overlap(a: Tensor, b: Tensor) -> float:
    """Mean squared cosine of the principal angles between the row spaces of two ``(r, m)`` matrices.

    1 if they are equal, about ``r / m`` by chance.
    """
    first, second = (torch.linalg.qr(each.T)[0] for each in (a, b))
    return float((first.T @ second).square().sum() / len(a))


@dataclass(frozen=True)
class Outcome:
    """Both methods on one ``Y``: relative errors, the least possible one and the sketch's, and what the rows share."""

    case: str
    seed: int
    descent: Factors
    alignment: Factors
    best: float
    sketch: float
    shared: float

    @property
    def gained(self) -> float:
        """By how much the cosine of ``Z`` and ``B`` rose."""
        return self.alignment.alignments[-1] - self.alignment.alignments[0]


def compare(case: str, values: Tensor, settings: Settings, seed: int) -> Outcome:
    """Both methods from the same start, on a random ``Y`` with the given singular values."""
    generator, n, r = generator_for(seed, "feedback", case), settings.size, settings.rank
    target = orthonormal(n, len(values), generator) * values @ orthonormal(n, len(values), generator).T
    feedback = torch.randn(n, r, generator=generator, dtype=torch.float64) / n**0.5
    descent, alignment = (factorise(target, feedback, settings, seed, aligned) for aligned in (False, True))
    best = float(values[r:].norm() / values.norm())
    return Outcome(
        case, seed, descent, alignment, best, sketch_error(target, feedback), overlap(descent.W, alignment.W)
    )


def run(settings: Settings, progress: Progress) -> Result:
    """Every case with every seed."""
    outcomes = []
    for case, values in settings.cases().items():
        for seed in settings.seeds:
            progress(f"{case}, seed {seed}")
            outcomes.append(compare(case, values, settings, seed))
    rows: list[list[Cell]] = [
        [o.case, o.seed, o.best, o.descent.error, o.alignment.error, o.sketch, o.gained, o.shared] for o in outcomes
    ]
    columns = [
        "rank",
        "seed",
        "least error",
        "gradient descent",
        "feedback alignment",
        "sketch",
        "cosine gained",
        "overlap",
    ]
    return Result(
        claims=_claims(settings, outcomes),
        plots=_plots(settings, outcomes),
        tables=[Table(title="Relative errors", columns=columns, rows=rows)],
        notes=[
            (
                "Overlap: mean squared cosine between the row spaces of W that the two methods find; by chance "
                f"{settings.rank / settings.size:.3f}. Cosine gained: rise of the cosine between Z and the feedback B."
            ),
            (
                "With rank to spare both methods approach zero more slowly: the spare modes of the start fade as a "
                "power of time."
            ),
        ],
    )


def _claims(settings: Settings, outcomes: list[Outcome]) -> list[Claim]:
    def of(case: str) -> list[Outcome]:
        return [each for each in outcomes if each.case == case]

    enough, short, flat = of("sufficient"), of("insufficient"), of("flat")
    return [
        Claim(
            name="sufficient_descent",
            statement="rank(Y) = r: relative error of gradient descent, worst seed",
            measured=max(each.descent.error for each in enough),
            most=1e-8,
        ),
        Claim(
            name="sufficient_feedback",
            statement="rank(Y) = r: relative error of feedback alignment, worst seed",
            measured=max(each.alignment.error for each in enough),
            most=1e-8,
        ),
        Claim(
            name="spare_feedback",
            statement="rank(Y) < r: relative error of feedback alignment, worst seed",
            measured=max(each.alignment.error for each in of("to spare")),
            most=1e-3,
        ),
        Claim(
            name="insufficient_descent",
            statement="rank(Y) > r: error of gradient descent over the least possible, worst seed",
            measured=max(each.descent.error / each.best for each in short),
            most=1.001,
        ),
        Claim(
            name="insufficient_feedback",
            statement="rank(Y) > r: error of feedback alignment over the least possible, best seed",
            measured=min(each.alignment.error / each.best for each in short),
            least=2,
        ),
        Claim(
            name="sketch",
            statement="rank(Y) > r: deviation of feedback alignment's error from that of the sketch BᵀY, worst seed",
            measured=max(abs(each.alignment.error - each.sketch) for each in short + flat),
            most=1e-8,
        ),
        Claim(
            name="aligns",
            statement="rise of the cosine of Z and B, least of all cases and seeds",
            measured=min(each.gained for each in outcomes),
            least=(settings.size * settings.rank) ** -0.5,  # standard deviation of the cosine by chance
        ),
        Claim(
            name="flat_error",
            statement="all singular values equal: error of feedback alignment over the least possible, worst seed",
            measured=max(each.alignment.error / each.best for each in flat),
            most=1.001,
        ),
        Claim(
            name="flat_overlap",
            statement="all singular values equal: overlap of what the methods find, though the errors are equal, mean",
            measured=sum(each.shared for each in flat) / len(flat),
            most=2.5 * settings.rank / settings.size,
        ),
    ]


def _plots(settings: Settings, outcomes: list[Outcome]) -> list[Plot]:
    first = {each.case: each for each in outcomes if each.seed == settings.seeds[0]}
    steps = range(0, settings.steps + 1, settings.every)
    plots = []
    for case, shown in (("sufficient", len(steps) // 3), ("insufficient", len(steps) // 10)):
        each, end = first[case], steps[shown]
        lines = [
            Line(label="gradient descent", points=curve(steps, each.descent.errors)[:shown], colour="--c0", width=2),
            Line(
                label="feedback alignment", points=curve(steps, each.alignment.errors)[:shown], colour="--c1", width=2
            ),
        ]
        if each.best:
            for label, value, dash in (("least possible", each.best, "6 4"), ("sketch BᵀY", each.sketch, "2 3")):
                lines.append(Line(label=label, points=curve((0, end), (value, value)), colour="--ink", dash=dash))
        plots.append(
            Plot(title=f"Rank {case}", unit="relative error", lines=lines, x_end=end, x_label="iteration", log=True)
        )
    lines = [
        Line(label=case, points=curve(steps, each.alignment.alignments)[:shown], colour=f"--c{index}", width=2)
        for index, (case, each) in enumerate(first.items())
    ]
    title = "Z turns towards B"
    return [*plots, Plot(title=title, unit="cosine", lines=lines, x_end=end, x_label="iteration")]


EXPERIMENT = Experiment(
    title="Feedback alignment: a random sketch, optimal if the rank suffices",
    summary="Y is factorised as Z W by gradient descent and by feedback alignment, whose backward pass uses a fixed "
    "random matrix. With r of at least the rank of Y both find it. With less, gradient descent finds the best "
    "approximation and feedback alignment a far worse one. Where all singular values are equal the errors are equal, "
    "and what is found overlaps no more than by chance.",
    formulas=(
        "min |Z W − Y|_F,   Z : n × r,   W : r × m",
        "both:               Z ← Z − η (Z W − Y) Wᵀ",
        "gradient descent:   W ← W − η Zᵀ (Z W − Y)",
        "feedback alignment: W ← W − η Bᵀ (Z W − Y),   B random and fixed",
        "at rest:            |Z W − Y|_F = |Y (I − P)|_F,   P onto the rows of Bᵀ Y",
    ),
    source="Garg, Vempala: How and When Random Feedback Works, arXiv 2111.08706; the closed form is derived here",
    settings=Settings(),
    run=run,
)
