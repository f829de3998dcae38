"""Deep matrix completion in a compressed network: about as many iterations as the full width, in less time.

Source: Yaras et al., Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation, arXiv 2406.04112.
``M: (d, d)`` of rank ``r``, of which a share of the entries is observed, is fitted by ``W_L ... W_1`` of width ``d``
from ``eps`` times orthogonal matrices. The compressed network is ``U C_L ... C_1 V^T`` with ``C_l(0) = eps I`` of size
``2r``, ``V(0) = V1`` from one gradient at the start and ``U(0) = W_{L:1}(0) V1 / eps^L``. The gradient is only nearly
of low rank here, so the outer factors must move, too: ``gamma`` times as fast as the inner ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ..lowrank.init import generator_for
from ..report.plot import Line, Plot
from .experiment import Cell, Claim, Experiment, Progress, Result, Table, curve
from .linear import Weights, gradients, orthonormal, product, touched_directions


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        size: ``d``.
        rank: ``r``. The factors of ``M`` are Gaussian, ``M`` is scaled to a top singular value of ``top``.
        observed: share of the entries.
        depth: ``L``.
        eps: scale of the start.
        rate: of the inner factors, as a share of the largest stable one, ``2 / (L p top^(2 - 2/L))``.
        gamma: rate of the outer factors over that of the inner ones.
        goal: relative error at which a network is done.
        most: iterations.
        sweep_size: ``d`` of the sweep over overestimated ranks.
        sweep_eps: its ``eps``.
        sweep_rate: its ``rate``.
        sweep_ranks: its estimates of ``r``.
    """

    size: int = 1000
    rank: int = 5
    observed: float = 0.2
    depth: int = 3
    top: float = 200.0
    eps: float = 0.08
    rate: float = 0.6
    gamma: float = 0.015
    goal: float = 1e-4
    most: int = 1000
    sweep_size: int = 500
    sweep_eps: float = 0.02
    sweep_rate: float = 0.6
    sweep_ranks: tuple[int, ...] = (5, 10, 20)
    sweep_most: int = 6000
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Problem:
    """``truth`` and ``mask``: ``(d, d)``; ``rate`` of the inner factors."""

    truth: Tensor
    mask: Tensor
    rate: float


@dataclass
class Fit:
    """How a network was trained.

    Attributes:
        setup: seconds before the first iteration.
        errors: relative error to ``M`` of all entries, one for each iteration.
        seconds: since the beginning of the setup, one for each iteration.
        done: whether the goal was reached.
    """

    setup: float = 0.0
    errors: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    done: bool = False

    @property
    def iterations(self) -> int:
        """Steps that were taken."""
        return len(self.errors) - 1


def make_problem(settings: Settings, size: int, rate: float, seed: int) -> Problem:
    """A random problem."""
    generator, r = generator_for(seed, "completion", size), settings.rank
    left, right = (torch.randn(size, r, generator=generator, dtype=torch.float64) for _ in range(2))
    values = torch.linalg.svdvals(torch.linalg.qr(left)[1] @ torch.linalg.qr(right)[1].T)
    truth = left @ right.T * (settings.top / float(values[0]))
    mask = (torch.rand(size, size, generator=generator, dtype=torch.float64) < settings.observed).double()
    stable = 2 / (settings.depth * settings.observed * settings.top ** (2 - 2 / settings.depth))
    return Problem(truth, mask, rate * stable)


def start_weights(settings: Settings, widths: tuple[int, ...], eps: float, seed: int) -> Weights:
    """``eps`` times matrices with orthonormal rows or columns, from ``widths[0]`` to ``widths[-1]``."""
    generator = generator_for(seed, "completion", "start", *widths)
    return [eps * orthonormal(out, into, generator) for into, out in pairwise(widths)]


class Chain:
    """``W_L ... W_1``, of any widths."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def output(self) -> Tensor:
        """``(d, d)``, the product."""
        return product(self.weights)

    def descend(self, residual: Tensor, rate: float) -> None:
        """One step of gradient descent. ``residual``: the gradient with respect to the output."""
        for weight, gradient in zip(self.weights, gradients(self.weights, residual), strict=True):
            weight.sub_(gradient, alpha=rate)


class Compressed:
    """``U C_L ... C_1 V^T`` of a wide chain at its start, for an estimate of the rank."""

    def __init__(self, weights: Weights, problem: Problem, rank: int, gamma: float) -> None:
        depth, eps = len(weights), float(weights[0][:, 0].norm())
        whole = product(weights)
        gradient = gradients(weights, problem.mask * (whole - problem.truth))[0]
        self.V, _ = touched_directions(weights[0], gradient, rank)
        self.V = self.V.clone()
        self.U = whole @ self.V / eps**depth
        self.inner = [eps * torch.eye(2 * rank, dtype=torch.float64) for _ in range(depth)]
        self.gamma = gamma

    def output(self) -> Tensor:
        """``(d, d)``, the product."""
        return self.U @ product(self.inner) @ self.V.T

    def descend(self, residual: Tensor, rate: float) -> None:
        """One step of gradient descent, of the outer factors with ``gamma`` times the rate."""
        core = product(self.inner)
        for_V = residual.T @ self.U
        right = residual @ self.V
        for weight, gradient in zip(self.inner, gradients(self.inner, self.U.T @ right), strict=True):
            weight.sub_(gradient, alpha=rate)
        if self.gamma:
            self.U.sub_(right @ core.T, alpha=self.gamma * rate)
            self.V.sub_(for_V @ core, alpha=self.gamma * rate)


def train(
    make: Callable[[], Chain | Compressed], problem: Problem, goal: float, most: int, name: str, progress: Progress
) -> Fit:
    """Train a network until the error of all entries reaches the goal, or for ``most`` iterations."""
    begin = time.perf_counter()
    network, fit, scale = make(), Fit(), float(problem.truth.norm())
    fit.setup = time.perf_counter() - begin
    for iteration in range(most + 1):
        residual = network.output() - problem.truth
        fit.errors.append(float(residual.norm()) / scale)
        fit.seconds.append(time.perf_counter() - begin)
        fit.done = fit.errors[-1] <= goal
        if fit.done or fit.errors[-1] > 1e3 or iteration == most:
            break
        network.descend(residual.mul_(problem.mask), problem.rate)
        progress(f"{name}, iteration {iteration}, error {fit.errors[-1]:.1e}")
    return fit


@dataclass
class Outcome:
    """One seed: the networks of width ``d``, and the sweep's by the estimate of the rank."""

    full: Fit
    compressed: Fit
    still: Fit
    sweep: dict[int, tuple[Fit, Fit]] = field(default_factory=dict)


def run(settings: Settings, progress: Progress) -> Result:
    """Full width, compressed, compressed with outer factors that stand still; then the sweep."""
    outcomes = {seed: _run(settings, seed, progress) for seed in settings.seeds}
    rows: list[list[Cell]] = []
    for seed, each in outcomes.items():
        named = {
            "full width": (settings.size, None, each.full),
            "compressed": (settings.size, settings.rank, each.compressed),
            "compressed, gamma 0": (settings.size, settings.rank, each.still),
        }
        for rank, (small, narrow) in each.sweep.items():
            named[f"compressed, estimate {rank}"] = (settings.sweep_size, rank, small)
            named[f"narrow, estimate {rank}"] = (settings.sweep_size, rank, narrow)
        for name, (size, estimate, fit) in named.items():
            width = size if estimate is None else 2 * estimate
            rows.append([name, seed, size, width, fit.iterations, fit.errors[-1], fit.setup, fit.seconds[-1]])
    columns = ["network", "seed", "d", "inner width", "iterations", "relative error", "setup, s", "seconds"]
    return Result(
        claims=_claims(settings, list(outcomes.values())),
        plots=_plots(settings, outcomes[settings.seeds[0]]),
        tables=[Table(title="Each network", columns=columns, rows=rows)],
        notes=[
            (
                "The paper starts at eps = 1e-3. The iterations that the modes take to escape grow as 1 / eps: "
                f"{0.001 / settings.eps:.4f} of them at eps = {settings.eps:g}, so that the full width takes minutes "
                "on a CPU and not hours."
            ),
            (
                "Seconds depend on the machine and its other load; all networks of one size ran one after the other. "
                "The setup of the compressed network (one gradient of the full width and its SVD) counts."
            ),
            _narrow_note(settings, list(outcomes.values())),
        ],
    )


def _narrow_note(settings: Settings, outcomes: list[Outcome]) -> str:
    ratios = ", ".join(
        f"{min(each.sweep[rank][1].iterations / each.sweep[rank][0].iterations for each in outcomes):.2f} at {rank}"
        for rank in settings.sweep_ranks
    )
    return (
        "A narrow network has the inner width k of the compressed one, and random outer factors at scale eps, which "
        "overlap with the modes of M by c = √(k/d) only. It escapes about ln(2/c) times later: the advantage "
        f"shrinks as the estimate of the rank grows. Iterations over those of the compressed network: {ratios}."
    )


def _run(settings: Settings, seed: int, progress: Progress) -> Outcome:
    d, rank, depth = settings.size, settings.rank, settings.depth
    problem = make_problem(settings, d, settings.rate, seed)
    weights = start_weights(settings, (d,) * (depth + 1), settings.eps, seed)

    def compressed(gamma: float) -> Fit:
        return train(
            lambda: Compressed(weights, problem, rank, gamma),
            problem,
            settings.goal,
            most,
            f"gamma {gamma:g}",
            progress,
        )

    most = settings.most
    moving = compressed(settings.gamma)
    most = 2 * moving.iterations
    still = compressed(0.0)
    full = train(lambda: Chain(weights), problem, settings.goal, settings.most, "full width", progress)
    outcome = Outcome(full, moving, still)
    d, eps = settings.sweep_size, settings.sweep_eps
    small = make_problem(settings, d, settings.sweep_rate, seed)
    wide = start_weights(settings, (d,) * (depth + 1), eps, seed)
    for estimate in settings.sweep_ranks:
        inner = 2 * estimate
        random = start_weights(settings, (d, *(inner,) * (depth - 1), d), eps, seed)
        makers: list[Callable[[], Chain | Compressed]] = [
            lambda estimate=estimate: Compressed(wide, small, estimate, settings.gamma),  # type: ignore[misc]
            lambda random=random: Chain(random),  # type: ignore[misc]
        ]
        fits = [
            train(make, small, settings.goal, settings.sweep_most, f"{kind}, estimate {estimate}", progress)
            for kind, make in zip(("compressed", "narrow"), makers, strict=True)
        ]
        outcome.sweep[estimate] = (fits[0], fits[1])
    return outcome


def _claims(settings: Settings, outcomes: list[Outcome]) -> list[Claim]:
    flat, ratios = [], []
    for each in outcomes:
        counts = [small.iterations if small.done else float("inf") for small, _ in each.sweep.values()]
        flat.append(max(counts) / min(counts))
        ratios += [(rank, narrow.iterations / small.iterations) for rank, (small, narrow) in each.sweep.items()]
    return [
        Claim(
            name="full_error",
            statement="full width: relative error of all entries",
            measured=max(each.full.errors[-1] for each in outcomes),
            most=settings.goal,
        ),
        Claim(
            name="compressed_error",
            statement="compressed: relative error of all entries",
            measured=max(each.compressed.errors[-1] for each in outcomes),
            most=settings.goal,
        ),
        Claim(
            name="iterations",
            statement="iterations of the compressed network over those of the full width",
            measured=max(each.compressed.iterations / each.full.iterations for each in outcomes),
            most=1.25,
        ),
        Claim(
            name="speedup",
            statement="seconds of the full width over those of the compressed network, setup included",
            measured=min(each.full.seconds[-1] / each.compressed.seconds[-1] for each in outcomes),
            least=5,
        ),
        Claim(
            name="stall_error",
            statement="gamma = 0: relative error after twice as many iterations",
            measured=min(each.still.errors[-1] for each in outcomes),
            least=100 * settings.goal,
        ),
        Claim(
            name="stall",
            statement="gamma = 0: change of the error over the last fifth of them, relative",
            measured=max(abs(1 - e.still.errors[-1] / e.still.errors[-len(e.still.errors) // 5]) for e in outcomes),
            most=0.01,
        ),
        Claim(
            name="flat",
            statement=f"iterations over estimates of the rank from {min(settings.sweep_ranks)} to "
            f"{max(settings.sweep_ranks)}, most over fewest, compressed",
            measured=max(flat),
            most=1.1,
        ),
        Claim(
            name="narrow",
            statement="iterations of a random narrow network over those of the compressed one, "
            f"estimates up to {2 * settings.rank}",
            measured=min(ratio for rank, ratio in ratios if rank <= 2 * settings.rank),
            least=2,
        ),
        Claim(
            name="published_narrow",
            statement="the same, all estimates",
            measured=min(ratio for _, ratio in ratios),
            least=2,
        ),
    ]


def _plots(settings: Settings, outcome: Outcome) -> list[Plot]:
    named = [
        ("full width", outcome.full, "--c1", ""),
        ("compressed", outcome.compressed, "--c0", ""),
        ("compressed, gamma 0", outcome.still, "--c7", "5 3"),
    ]
    seconds = [
        Line(label=name, points=curve(fit.seconds, fit.errors), colour=colour, dash=dash, width=2)
        for name, fit, colour, dash in named
    ]
    iterations = [
        Line(label=name, points=curve(range(len(fit.errors)), fit.errors), colour=colour, dash=dash, width=2)
        for name, fit, colour, dash in named
    ]
    sweep = []
    for index, (rank, (small, narrow)) in enumerate(outcome.sweep.items()):
        for kind, fit, dash in (("compressed", small, ""), ("narrow", narrow, "5 3")):
            points = curve(range(len(fit.errors)), fit.errors)
            sweep.append(Line(label=f"{kind}, {rank}", points=points, colour=f"--c{index % 8}", dash=dash))
    length = max(outcome.full.iterations, outcome.still.iterations)
    longest = max((narrow.iterations for _, narrow in outcome.sweep.values()), default=1)
    unit = "relative, all entries"
    return [
        Plot(title="Error over time", unit=unit, lines=seconds, x_end=outcome.full.seconds[-1], x_label="s", log=True),
        Plot(title="Error over iterations", unit=unit, lines=iterations, x_end=length, x_label="iteration", log=True),
        Plot(
            title="Estimates of the rank",
            unit=f"{unit}, d = {settings.sweep_size}",
            lines=sweep,
            x_end=longest,
            x_label="iteration",
            log=True,
        ),
    ]


EXPERIMENT = Experiment(
    title="Deep matrix completion in a compressed network",
    summary="A low-rank matrix is completed by a deep linear network of full width and by a compressed one whose outer "
    "factors come from a single gradient at the start. Both take about as many iterations; the compressed one takes "
    "a fraction of the time. Outer factors that stand still leave an error. An overestimated rank costs no iterations, "
    "while random narrow factors take longer.",
    formulas=(
        "min ½ |mask ∘ (W_L ⋯ W₁ − M)|²,   W_l(0) = eps · orthogonal,   rate η",
        "compressed: U C_L ⋯ C₁ Vᵀ,   C_l(0) = eps I (2r × 2r),   rate η for C_l, γη for U and V",
        "V(0) = V₁ = span( W₁(0)ᵀ u_i , v_i : i ≤ r ) of the gradient of W₁,   U(0) = W_L(0) ⋯ W₁(0) V₁ / epsᴸ",
    ),
    source="Yaras, Wang, Balzano, Qu: Compressible Dynamics, ICML 2024, arXiv 2406.04112",
    settings=Settings(),
    run=run,
)
