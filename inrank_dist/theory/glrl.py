"""Gradient descent from a tiny start follows greedy low-rank learning: it learns rank by rank.

Source: Li, Luo, Lyu, Towards Resolving the Implicit Bias of Gradient Descent for Matrix Factorization: Greedy Low-Rank
Learning, ICLR 2021, arXiv 2012.09839. To minimise ``f(W)`` over factors ``W = U V^T`` (or ``U U^T``), greedy low-rank
learning starts at rank 0 and repeats: while the top singular value (eigenvalue) of ``-grad f(W_r)`` is positive, add
its singular pair, scaled by ``sqrt(eps)``, to the factors and train to convergence.

Here ``f(W) = |mask * (W - Y)|_F^2 / (2 p)``: a low-rank matrix with noise, of which a share ``p`` of the entries is
observed. Noise makes "positive" read "above ``tolerance``", so that both methods stop before they fit it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..lowrank.init import generator_for
from ..report.plot import Line, Mark, Plot
from .experiment import Cell, Claim, Experiment, Progress, Result, Table, curve
from .linear import orthonormal, relative_error


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        size: of the square matrix.
        targets: its singular values.
        observed: ``p``.
        noise: standard deviation of an entry's noise.
        tolerance: top singular value of ``-grad f`` up to which nothing is left to learn.
        eps: squared scale of a new mode.
        starts: scales of the factors' full-rank start in gradient descent, descending; the claims are on the last.
        rate: of gradient descent.
        converged: norm of the factors' gradient at which a stage ends.
        steps: most steps of a stage, and of gradient descent.
    """

    size: int = 20
    targets: tuple[float, ...] = (4.0, 2.0, 1.0)
    observed: float = 0.7
    noise: float = 0.01
    tolerance: float = 0.25
    eps: float = 1e-8
    starts: tuple[float, ...] = (1e-2, 1e-4, 1e-8, 1e-12)
    rate: float = 0.1
    converged: float = 1e-6
    steps: int = 6000
    every: int = 5
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Problem:
    """``truth``, ``noisy`` and ``mask``: ``(d, d)``, ``mask`` of zeros and ones. Symmetric problems have ``U = V``."""

    truth: Tensor
    noisy: Tensor
    mask: Tensor
    symmetric: bool

    def gradient(self, W: Tensor) -> Tensor:
        """``grad f(W)``."""
        return self.mask * (W - self.noisy) / self.mask.mean()

    def top(self, W: Tensor) -> tuple[float, Tensor, Tensor]:
        """The top singular value of ``-grad f(W)`` and its vectors; of a symmetric problem the top eigenvalue."""
        if self.symmetric:
            values, vectors = torch.linalg.eigh(-self.gradient(W))
            return float(values[-1]), vectors[:, -1], vectors[:, -1]
        left, values, right = torch.linalg.svd(-self.gradient(W))
        return float(values[0]), left[:, 0], right[0]


def make_problem(settings: Settings, symmetric: bool, seed: int) -> Problem:
    """A random problem."""
    generator, d = generator_for(seed, "glrl", symmetric), settings.size
    left, right = (orthonormal(d, len(settings.targets), generator) for _ in range(2))
    truth = left * torch.tensor(settings.targets, dtype=torch.float64) @ (left if symmetric else right).T
    noise = settings.noise * torch.randn(d, d, generator=generator, dtype=torch.float64)
    mask = (torch.rand(d, d, generator=generator, dtype=torch.float64) < settings.observed).double()
    if symmetric:
        noise, mask = ((each.triu() + each.triu(1).T) for each in (noise, mask))
    return Problem(truth, truth + noise, mask, symmetric)


def factor_step(problem: Problem, U: Tensor, V: Tensor, rate: float) -> tuple[Tensor, Tensor, float]:
    """One step of gradient descent on ``f(U V^T)``; on ``f(U U^T) / 2`` where ``V`` is ``U``.

    Returns:
        The new factors, and the norm of the gradient of both at the old ones.
    """
    gradient = problem.gradient(U @ V.T)
    for_U = gradient @ V
    if problem.symmetric:
        U = U - rate * for_U
        return U, U, float(for_U.norm())
    for_V = gradient.T @ U
    return U - rate * for_U, V - rate * for_V, float((for_U.square().sum() + for_V.square().sum()).sqrt())


def greedy(problem: Problem, settings: Settings, progress: Progress) -> list[Tensor]:
    """Greedy low-rank learning: what its stages converge to, ``W_1`` first."""
    U = V = problem.truth.new_zeros(settings.size, 0)
    stages: list[Tensor] = []
    while len(stages) < settings.size:
        value, left, right = problem.top(U @ V.T)
        if value <= settings.tolerance:
            break
        scale = settings.eps**0.5
        U, V = torch.cat([U, scale * left[:, None]], 1), torch.cat([V, scale * right[:, None]], 1)
        largest = 0.0
        for _ in range(settings.steps):
            U, V, norm = factor_step(problem, U, V, settings.rate)
            largest = max(largest, norm)
            # The first gradients are tiny, too: the new mode has to grow first.
            if norm < settings.converged < 1e-3 * largest:
                break
        stages.append(U @ V.T)
        progress(f"greedy, rank {len(stages)}")
    return stages


@dataclass(frozen=True)
class Descent:
    """Gradient descent from a full-rank start.

    Attributes:
        steps: at which it was looked at.
        spectra: ``(n, d)``, singular values of ``W`` there.
        distances: ``(n, stages)``, ``|W - W_r|_F / |W_r|_F`` to the stages of greedy learning.
        final: ``W`` where it rests for the first time with nothing left to learn.
    """

    steps: list[int]
    spectra: Tensor
    distances: Tensor
    final: Tensor

    def closest(self) -> list[int]:
        """For each stage the index of the nearest point of the path."""
        return self.distances.argmin(0).tolist()

    def ranks(self, threshold: float) -> list[int]:
        """Of ``W`` at these points: how many singular values exceed ``threshold``."""
        return [int((self.spectra[index] > threshold).sum()) for index in self.closest()]

    @property
    def farthest(self) -> float:
        """The distance to the stage that the path misses by most."""
        return float(self.distances.amin(0).max())


def descend(
    problem: Problem, stages: list[Tensor], settings: Settings, start: float, seed: int, progress: Progress
) -> Descent:
    """Gradient descent from ``start`` times Gaussian factors ``(d, d)`` until it rests with nothing left to learn.

    It rests where the norm of the factors' gradient has a minimum. What is left is judged as in greedy learning.
    """
    generator, d = generator_for(seed, "glrl", "start"), settings.size
    U, V = (start * torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5 for _ in range(2))
    if problem.symmetric:
        V = U
    steps, spectra, distances = [], [], []
    before = 0.0
    for step in range(settings.steps):
        W = U @ V.T
        U, V, norm = factor_step(problem, U, V, settings.rate)
        if step % settings.every:
            continue
        steps.append(step)
        spectra.append(torch.linalg.svdvals(W))
        distances.append(torch.tensor([relative_error(W, stage) for stage in stages], dtype=torch.float64))
        progress(f"gradient descent from {start:g}", step, settings.steps)
        if norm > before and float(spectra[-1][0]) > settings.tolerance and problem.top(W)[0] <= settings.tolerance:
            break
        before = norm
    return Descent(steps, torch.stack(spectra), torch.stack(distances), W)


@dataclass(frozen=True)
class Comparison:
    """Both methods on one problem; ``descents`` by start."""

    kind: str
    seed: int
    problem: Problem
    stages: list[Tensor]
    descents: dict[float, Descent]


def run(settings: Settings, progress: Progress) -> Result:
    """Both kinds of problems, every seed, every start."""
    found = []
    for kind, symmetric in (("symmetric", True), ("asymmetric", False)):
        for seed in settings.seeds:
            problem = make_problem(settings, symmetric, seed)
            stages = greedy(problem, settings, progress)
            descents = {s: descend(problem, stages, settings, s, seed, progress) for s in settings.starts}
            found.append(Comparison(kind, seed, problem, stages, descents))
    rows: list[list[Cell]] = [
        [
            each.kind,
            ", ".join(map(str, path.ranks(settings.tolerance / 2))),
            ", ".join(f"{path.steps[index]:,}" for index in path.closest()),
            each.seed,
            start,
            len(each.stages),
            path.farthest,
            relative_error(each.stages[-1], each.problem.truth),
            relative_error(path.final, each.problem.truth),
        ]
        for each in found
        for start, path in each.descents.items()
    ]
    columns = ["problem", "ranks nearest to the stages", "at steps", "seed", "start", "greedy rank", "farthest stage"]
    columns += ["greedy error", "descent error"]
    return Result(
        claims=[claim for kind in ("symmetric", "asymmetric") for claim in _claims(settings, kind, found)],
        plots=_plots(settings, found),
        tables=[Table(title="Each run", columns=columns, rows=rows)],
        notes=[
            (
                "Errors are relative to the truth, without noise; both methods stop when nothing above the noise is "
                "left to learn. A rank counts singular values above half of the tolerance."
            ),
            (
                "From larger starts gradient descent begins the next mode before the last has converged: it passes "
                "the stages at a distance."
            ),
        ],
    )


def _claims(settings: Settings, kind: str, found: list[Comparison]) -> list[Claim]:
    chosen = [each for each in found if each.kind == kind]
    smallest = settings.starts[-1]
    right, closer, errors = 0, 0, []
    for each in chosen:
        path, nearest = each.descents[smallest], each.descents[smallest].closest()
        in_order = path.ranks(settings.tolerance / 2) == list(range(1, len(each.stages) + 1))
        right += in_order and nearest == sorted(nearest)
        farthest = [other.farthest for other in each.descents.values()]
        closer += farthest == sorted(farthest, reverse=True)
        reference = relative_error(each.stages[-1], each.problem.truth)
        errors.append(abs(relative_error(path.final, each.problem.truth) / reference - 1))
    return [
        Claim(
            name=f"{kind}_rank",
            statement=f"{kind}: seeds whose greedy rank is that of the truth",
            measured=sum(len(each.stages) == len(settings.targets) for each in chosen),
            least=len(chosen),
        ),
        Claim(
            name=f"{kind}_order",
            statement=f"{kind}: seeds where descent passes the stages in their order, each at its rank",
            measured=right,
            least=len(chosen),
        ),
        Claim(
            name=f"{kind}_distance",
            statement=f"{kind}: farthest that descent stays from a stage, relative, worst seed",
            measured=max(each.descents[smallest].farthest for each in chosen),
            most=0.05,
        ),
        Claim(
            name=f"{kind}_closer",
            statement=f"{kind}: seeds where each smaller start passes the stages closer",
            measured=closer,
            least=len(chosen),
        ),
        Claim(
            name=f"{kind}_error",
            statement=f"{kind}: final error of descent against greedy learning, relative difference, worst seed",
            measured=max(errors),
            most=0.05,
        ),
    ]


def _plots(settings: Settings, found: list[Comparison]) -> list[Plot]:
    start, plots = settings.starts[-1], []
    for each in found:
        if each.seed != settings.seeds[0]:
            continue
        path = each.descents[start]
        marks = [
            Mark(x=path.steps[index], label="nearest to a stage", colour="--ink", dash="2 3", tooltip=f"stage {r + 1}")
            for r, index in enumerate(path.closest())
        ]
        lines = []
        for index in range(settings.size - 1, -1, -1):
            label = f"value {index + 1}" if index < len(each.stages) else "the others"
            colour = f"--c{min(index, 7)}" if index < len(each.stages) else "--c7"
            lines.append(Line(label=label, points=curve(path.steps, path.spectra[:, index]), colour=colour))
        end = path.steps[-1]
        title = f"{each.kind.capitalize()}: singular values of W"
        axis = f"iteration, start {start:g}"
        plots.append(Plot(title=title, lines=lines, marks=marks, x_end=end, x_label=axis, from_zero=True))
        lines = [
            Line(label=f"to W{r + 1}", points=curve(path.steps, path.distances[:, r]), colour=f"--c{r % 8}")
            for r in range(len(each.stages))
        ]
        title = f"{each.kind.capitalize()}: distance to the stages"
        unit = "relative"
        plots.append(Plot(title=title, unit=unit, lines=lines, marks=marks, x_end=end, x_label=axis, log=True))
    lines = [
        Line(
            label=each.kind,
            points=curve(reversed(settings.starts), [each.descents[s].farthest for s in reversed(settings.starts)]),
            colour="--c0" if each.problem.symmetric else "--c1",
            dots=True,
        )
        for each in found
    ]
    title = "The smaller the start, the closer to the stages"
    unit, axis = "distance to the farthest stage, each seed", "scale of the start"
    plot = Plot(title=title, unit=unit, lines=lines, x_end=max(settings.starts), x_label=axis, x_log=True, log=True)
    return [plot, *plots]


EXPERIMENT = Experiment(
    title="Greedy low-rank learning: gradient descent from a tiny start",
    summary="A noisy low-rank matrix is completed from a part of its entries. Greedy low-rank learning adds one mode "
    "at a time, the top singular pair of the negative gradient, and trains to convergence before the next. Gradient "
    "descent on full-rank factors from a tiny start passes the same stages in the same order.",
    formulas=(
        "f(W) = |mask ∘ (W − Y)|² / (2p),   W = U Vᵀ (asymmetric) or U Uᵀ (symmetric)",
        "greedy:  while σ₁(−∇f(W_r)) > tolerance:  U ← [U, √eps u₁],  V ← [V, √eps v₁],  train to convergence",
        "descent: U, V of full rank,  U(0), V(0) = start · Gaussian",
    ),
    source="Li, Luo, Lyu: Towards Resolving the Implicit Bias of Gradient Descent, ICLR 2021, arXiv 2012.09839",
    settings=Settings(),
    run=run,
)
