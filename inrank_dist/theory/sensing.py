"""Over-parameterised matrix sensing finds a low-rank matrix from a small start, also with factors of full width.

Source: Soltanolkotabi, Stöger, Xie, Implicit Balancing and Regularization: Generalization and Convergence Guarantees
for Overparameterized Asymmetric Matrix Sensing, arXiv 2303.14244. ``M: (d, d)`` of rank ``r`` is seen through ``n``
random measurements ``y_i = <A_i, M>``, fewer than ``d^2``. Gradient descent on ``|A(U V^T) - y|^2 / 2`` with
``U, V: (d, k)``, ``k`` up to ``d``, fits many matrices; from a start of scale ``alpha`` it finds one whose distance to
``M`` falls as a power of ``alpha``. The factors first align with the top singular vectors of ``A^*(y)``, then grow, and
stay balanced: ``U^T U - V^T V``, which gradient flow conserves, stays small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ..lowrank.init import generator_for
from ..report.plot import Line, Plot
from .experiment import Cell, Claim, Experiment, Progress, Result, Table, curve
from .linear import orthonormal, relative_error


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        size: ``d``.
        targets: singular values of ``M``.
        measurements: ``n``. ``M`` has ``r (2d - r)`` degrees of freedom.
        widths: values of ``k``, ascending; the last is ``d``.
        starts: values of ``alpha``, descending.
        rate: of gradient descent.
    """

    size: int = 30
    targets: tuple[float, ...] = (1.0, 0.5)
    measurements: int = 300
    widths: tuple[int, ...] = (5, 30)
    starts: tuple[float, ...] = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-6)
    rate: float = 0.2
    steps: int = 2000
    every: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Problem:
    """``truth: (d, d)``, ``maps: (n, d^2)`` and ``values: (n,)``."""

    truth: Tensor
    maps: Tensor
    values: Tensor

    def top(self) -> tuple[Tensor, Tensor]:
        """The top left and right singular vector of ``A^*(y)``."""
        left, _, right = torch.linalg.svd((self.values @ self.maps).view_as(self.truth))
        return left[:, 0], right[0]

    def gradient(self, W: Tensor) -> tuple[Tensor, float]:
        """The gradient with respect to ``W``, and the relative error of the measurements."""
        residual = self.maps @ W.flatten() - self.values
        return (residual @ self.maps).view_as(W), float(residual.norm() / self.values.norm())


@dataclass
class Path:
    """Gradient descent from one start, every ``Settings.every`` steps.

    Attributes:
        errors: relative error to ``M``.
        fits: relative error of the measurements.
        imbalances: ``|U^T U - V^T V|_2``.
        alignments: squared cosine between the top left singular vector of ``U`` and that of ``A^*(y)``, or between that
            of ``V`` and the top right one, whichever is smaller.
    """

    errors: list[float] = field(default_factory=list)
    fits: list[float] = field(default_factory=list)
    imbalances: list[float] = field(default_factory=list)
    alignments: list[float] = field(default_factory=list)

    @property
    def growth(self) -> int:
        """Index of the first point with an error below 0.9; the last point, if there is none."""
        return next((index for index, error in enumerate(self.errors) if error < 0.9), len(self.errors) - 1)


def make_problem(settings: Settings, seed: int) -> Problem:
    """A random ``M`` and Gaussian measurements with variance ``1/n``, so that ``A^* A`` is the identity on average."""
    generator, d, n = generator_for(seed, "sensing"), settings.size, settings.measurements
    left, right = (orthonormal(d, len(settings.targets), generator) for _ in range(2))
    truth = left * torch.tensor(settings.targets, dtype=torch.float64) @ right.T
    maps = torch.randn(n, d * d, generator=generator, dtype=torch.float64) / n**0.5
    return Problem(truth, maps, maps @ truth.flatten())


def step(U: Tensor, V: Tensor, gradient: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """One step of gradient descent on the factors."""
    return U - rate * gradient @ V, V - rate * gradient.T @ U


def imbalance(U: Tensor, V: Tensor) -> Tensor:
    """``(k, k)``, ``U^T U - V^T V``."""
    return U.T @ U - V.T @ V


def descend(problem: Problem, settings: Settings, width: int, start: float, seed: int, progress: Progress) -> Path:
    """Gradient descent from Gaussian factors whose columns have a norm of about ``start``."""
    generator, d = generator_for(seed, "sensing", "start"), settings.size
    U, V = (start * torch.randn(d, width, generator=generator, dtype=torch.float64) / d**0.5 for _ in range(2))
    path, wanted = Path(), problem.top()
    for iteration in range(settings.steps + 1):
        W = U @ V.T
        gradient, fit = problem.gradient(W)
        if iteration % settings.every == 0:
            tops = [torch.linalg.svd(factor, full_matrices=False)[0][:, 0] for factor in (U, V)]
            path.errors.append(relative_error(W, problem.truth))
            path.fits.append(fit)
            path.imbalances.append(float(torch.linalg.matrix_norm(imbalance(U, V), 2)))
            cosines = [top @ vector for top, vector in zip(tops, wanted, strict=True)]
            path.alignments.append(float(min(cosine.square() for cosine in cosines)))
            progress(f"width {width}, start {start:g}, seed {seed}", iteration, settings.steps)
        U, V = step(U, V, gradient, settings.rate)
    return path


Paths = dict[tuple[int, float, int], Path]
"""By width, start and seed."""


def run(settings: Settings, progress: Progress) -> Result:
    """Every width, start and seed."""
    paths: Paths = {}
    for seed in settings.seeds:
        problem = make_problem(settings, seed)
        for width in settings.widths:
            for start in settings.starts:
                paths[width, start, seed] = descend(problem, settings, width, start, seed, progress)
    rows: list[list[Cell]] = [
        [width, start, *_range(settings, paths, width, start, "errors"), *_range(settings, paths, width, start, "fits")]
        for width in settings.widths
        for start in settings.starts
    ]
    columns = ["width k", "start", "error, least", "error, most", "measurements, least", "measurements, most"]
    d, r = settings.size, len(settings.targets)
    title = "Relative errors at the end: of the matrix and of its measurements, over the seeds"
    return Result(
        claims=_claims(settings, paths),
        plots=_plots(settings, paths),
        tables=[Table(title=title, columns=columns, rows=rows)],
        notes=[
            (
                f"{settings.measurements} measurements of {d * d} entries; a matrix of rank {r} has "
                f"{r * (2 * d - r)} degrees of freedom. Where the error is large and that of the measurements is not, "
                "another matrix was found that fits them."
            ),
            (
                "The imbalance that remains after a small start comes from the finite step, not from the start: "
                "gradient flow would keep it."
            ),
        ],
    )


def _range(settings: Settings, paths: Paths, width: int, start: float, key: str) -> tuple[float, float]:
    last = [getattr(paths[width, start, seed], key)[-1] for seed in settings.seeds]
    return min(last), max(last)


def exponents(starts: tuple[float, ...], errors: list[float]) -> list[float]:
    """The slope of ``log(error)`` over ``log(start)`` between each start and the next."""
    x, y = ([math.log(value) for value in each] for each in (starts, errors))
    return [(b - a) / (d - c) for (a, b), (c, d) in zip(pairwise(y), pairwise(x), strict=True)]


def _claims(settings: Settings, paths: Paths) -> list[Claim]:
    narrow, wide = settings.widths[0], settings.widths[-1]
    large, small = settings.starts[0], settings.starts[-1]
    below = settings.starts[1:]
    slopes = [exponents(below, [paths[wide, start, seed].errors[-1] for start in below]) for seed in settings.seeds]
    smallest = [paths[wide, small, seed] for seed in settings.seeds]
    return [
        Claim(
            name="small_start",
            statement=f"width {wide}, start {small:g}: relative error of the matrix, worst seed",
            measured=_range(settings, paths, wide, small, "errors")[1],
            most=0.02,
        ),
        Claim(
            name="large_start_fits",
            statement=f"width {wide}, start {large:g}: relative error of the measurements, worst seed",
            measured=_range(settings, paths, wide, large, "fits")[1],
            most=1e-6,
        ),
        Claim(
            name="large_start",
            statement="the same: relative error of the matrix, best seed",
            measured=_range(settings, paths, wide, large, "errors")[0],
            least=0.5,
        ),
        Claim(
            name="power",
            statement=f"width {wide}: exponent of the start in the error, from {below[0]:g} on, least of all",
            measured=min(map(min, slopes)),
            least=0.2,
        ),
        Claim(
            name="width",
            statement=f"start {small:g}: error at width {wide} over that at width {narrow}, worst seed",
            measured=max(
                paths[wide, small, seed].errors[-1] / paths[narrow, small, seed].errors[-1] for seed in settings.seeds
            ),
            most=3,
        ),
        Claim(
            name="balanced",
            statement=f"width {wide}, start {small:g}: largest |UᵀU − VᵀV| over σ₁(M), worst time and seed",
            measured=max(max(path.imbalances) for path in smallest) / settings.targets[0],
            most=0.01,
        ),
        Claim(
            name="aligns_first",
            statement=f"width {wide}, start {small:g}: alignment with A*(y) when growth begins (error 0.9), worst seed",
            measured=min(path.alignments[path.growth] for path in smallest),
            least=0.9,
        ),
    ]


def _plots(settings: Settings, paths: Paths) -> list[Plot]:
    seed, wide = settings.seeds[0], settings.widths[-1]
    steps = range(0, settings.steps + 1, settings.every)
    starts = list(reversed(settings.starts))
    power = [
        Line(
            label=f"width {width}",
            points=curve(starts, [paths[width, start, each].errors[-1] for start in starts]),
            colour=f"--c{index}",
            dots=True,
        )
        for index, width in enumerate(settings.widths)
        for each in settings.seeds
    ]

    def over_time(key: str, title: str, unit: str, *, log: bool, shown: int) -> Plot:
        lines = [
            Line(
                label=f"start {start:g}",
                points=curve(steps, getattr(paths[wide, start, seed], key))[:shown],
                colour=f"--c{index % 8}",
            )
            for index, start in enumerate(settings.starts)
        ]
        return Plot(title=title, unit=unit, lines=lines, x_end=steps[shown - 1], x_label="iteration", log=log)

    early = max(2, len(steps) // 10)
    title, unit = "The smaller the start, the closer to M", "relative error at the end, each seed"
    return [
        Plot(title=title, unit=unit, lines=power, x_end=starts[-1], x_label="start α", x_log=True, log=True),
        over_time("errors", f"Error of the matrix, width {wide}", "relative", log=True, shown=len(steps)),
        over_time("alignments", "Alignment with A*(y), early", "squared cosine, top mode", log=False, shown=early),
        over_time("imbalances", "Imbalance", "|UᵀU − VᵀV|", log=True, shown=len(steps)),
        over_time("fits", "Error of the measurements", "relative", log=True, shown=len(steps)),
    ]


EXPERIMENT = Experiment(
    title="Matrix sensing: a small start finds the low-rank matrix, also at full width",
    summary="A low-rank matrix is recovered from fewer random measurements than it has entries, by gradient descent on "
    "two factors that are wider than its rank. From a large start the measurements are fitted by a wrong matrix. From "
    "a small one the factors align, grow as a low-rank product and stay balanced, and the error falls with the start.",
    formulas=(
        "min ½ |A(U Vᵀ) − y|²,   y = A(M),   U, V : d × k,   U(0), V(0) = α · Gaussian / √d",
        "alignment : while U, V are tiny, [U; V] ← (I + η [0 A*(y); A*(y)ᵀ 0]) [U; V]: a power method",
        "balance   : d/dt (UᵀU − VᵀV) = 0;  per step it changes by η² (Vᵀ Gᵀ G V − Uᵀ G Gᵀ U)",
        "bound     : |U Vᵀ − M|_F = O(α^c), c > 0, for every k ≥ r",
    ),
    source="Soltanolkotabi, Stöger, Xie: Implicit Balancing and Regularization, arXiv 2303.14244",
    settings=Settings(),
    run=run,
)
