"""Cumulative updates of a three-layer linear network grow mode by mode, and are low-rank only from a small start.

Source: Zhao et al., InRank, arXiv 2306.11250. With whitened input the loss is ``|W_3 W_2 W_1 - M|_F^2 / 2``, and each
layer starts at ``eps`` times an orthogonal matrix. In the singular bases of ``M`` the modes decouple: the strength
``a`` of a mode with singular value ``s`` obeys ``da/dt = a^2 (s - a^3)``, ``a(0) = eps``. It escapes from its start at
about ``t = 1 / (s eps)``. Directions that ``M`` lacks (``s = 0``) shrink: ``a(t) = (eps^-4 + 4 t)^(-1/4)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lowrank.init import generator_for
from ..report.plot import Line, Plot
from .experiment import Cell, Claim, Experiment, Progress, Result, Table, curve
from .linear import Weights, gradients, orthonormal, product, touched_directions

SAMPLES = 200
"""Times at which spectra are taken."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        width: of all layers.
        targets: singular values of ``M``, descending.
        small: scale of a start whose updates are low-rank.
        large: scale of a start whose updates are not.
        time: length of the gradient flow.
        step: of gradient descent, in units of ``time``.
    """

    width: int = 30
    targets: tuple[float, ...] = (3.0, 2.0, 1.0)
    small: float = 0.1
    large: float = 1.0
    time: float = 20.0
    step: float = 0.0025
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def rank(self) -> int:
        """Of ``M``."""
        return len(self.targets)


@dataclass(frozen=True)
class Trajectory:
    """Gradient descent from one start.

    Attributes:
        times: ``(n,)``.
        updates: ``(n, 3, d)``, singular values of ``W_l(t) - W_l(0)`` for each layer.
        modes: ``(n, r + 1)``, strengths of the modes of ``M``, ``(u_i^T W_3 W_2 W_1 v_i)^(1/3)``, and of the null
            block in the first layer.
        null: ``(3, k)``, singular values of the last updates in the directions that the modes of ``M`` never touch.
    """

    times: Tensor
    updates: Tensor
    modes: Tensor
    null: Tensor


def solve_ode(targets: Tensor, eps: float, times: Tensor, step: float) -> Tensor:
    """``da/dt = a^2 (s - a^3)`` from ``a(0) = eps``, by fourth-order Runge-Kutta.

    Args:
        targets: ``(r,)``, the singular values ``s``.
        times: ``(n,)``, ascending from 0.

    Returns:
        ``(n, r)``.
    """

    def slope(a: Tensor) -> Tensor:
        return a.square() * (targets - a**3)

    a = torch.full_like(targets, eps)
    found = [a]
    for length in times.diff().tolist():
        count = max(1, round(length / step))
        h = length / count
        for _ in range(count):
            k1 = slope(a)
            k2 = slope(a + h / 2 * k1)
            k3 = slope(a + h / 2 * k2)
            k4 = slope(a + h * k3)
            a = a + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        found.append(a)
    return torch.stack(found)


def null_strength(eps: float, time: float) -> float:
    """``a(t)`` of a direction that ``M`` lacks."""
    return float((eps**-4 + 4 * time) ** -0.25)


def simulate(settings: Settings, eps: float, seed: int, aligned: bool, progress: Progress) -> Trajectory:
    """Gradient descent on ``|W_3 W_2 W_1 - M|_F^2 / 2``.

    Args:
        aligned: whether the product starts with the singular vectors of ``M``, for which the ODE is exact. Otherwise
            all orthogonal matrices are independent.
    """
    generator, d, rank = generator_for(seed, "incremental"), settings.width, settings.rank
    left, right, *layers = (orthonormal(d, d, generator) for _ in range(5))
    if aligned:
        layers = [layers[0] @ right.T, layers[1] @ layers[0].T, left @ layers[1].T]
    left, values = left[:, :rank], torch.tensor(settings.targets, dtype=torch.float64)
    target = left * values @ right[:, :rank].T
    weights: Weights = [eps * layer for layer in layers]
    start = [weight.clone() for weight in weights]
    null = right[:, rank:]
    if not aligned:
        _, null = touched_directions(weights[0], gradients(weights, product(weights) - target)[0], rank)
    steps = round(settings.time / settings.step)
    every = max(1, steps // SAMPLES)
    times, updates, modes = [], [], []
    for step in range(steps + 1):
        whole = product(weights)
        if step % every == 0 or step == steps:
            times.append(step * settings.step)
            updates.append(torch.linalg.svdvals(torch.stack(weights) - torch.stack(start)))
            strength = (left.T @ whole @ right[:, :rank]).diagonal()
            untouched = (weights[0] @ null).norm() / null.shape[1] ** 0.5
            modes.append(torch.cat([strength.sign() * strength.abs() ** (1 / 3), untouched[None]]))
            progress(f"eps {eps:g}, seed {seed}", step, steps)
        if step < steps:
            for weight, gradient in zip(weights, gradients(weights, whole - target), strict=True):
                weight.sub_(gradient, alpha=settings.step)
    shifts = []
    for weight, before in zip(weights, start, strict=True):
        shifts.append(torch.linalg.svdvals((weight - before) @ null))
        null = before @ null / eps  # what these directions are for the next layer
    return Trajectory(
        torch.tensor(times, dtype=torch.float64), torch.stack(updates), torch.stack(modes), torch.stack(shifts)
    )


def run(settings: Settings, progress: Progress) -> Result:
    """Simulate from aligned and from independent starts at both scales, and hold them against the ODE."""
    claims: list[Claim] = []
    plots: list[Plot] = []
    rows: list[list[Cell]] = []
    targets = torch.tensor([*settings.targets, 0.0], dtype=torch.float64)
    for eps in (settings.small, settings.large):
        aligned = simulate(settings, eps, settings.seeds[0], True, progress)
        independent = [simulate(settings, eps, seed, False, progress) for seed in settings.seeds]
        solution = solve_ode(targets, eps, aligned.times, settings.step)
        claims += _spectrum_claims(settings, eps, independent) + _ode_claims(eps, aligned, independent, solution)
        names = ["aligned", *(f"independent, seed {seed}" for seed in settings.seeds)]
        rows += [_row(settings, eps, *pair) for pair in zip(names, [aligned, *independent], strict=True)]
        if eps == settings.small:
            middle = independent
        plots += [_update_plot(settings, eps, independent[0]), _ode_plot(settings, eps, aligned, solution)]
    columns = ["start", "eps", *(f"value {i + 1}" for i in range(settings.rank)), f"value {settings.rank + 1}"]
    columns += ["null block, least", "null block, most"]
    title = "Singular values of the cumulative update (first layer; value after the last mode: largest of all layers)"
    return Result(
        claims=claims,
        plots=plots,
        tables=[Table(title=title, columns=columns, rows=rows)],
        notes=[EXACT, TOUCHED, _middle_note(settings, middle)],
    )


EXACT = (
    "The ODE is exact for a start that has the singular vectors of M. From independent orthogonal matrices each mode "
    "begins with its chance overlap, escapes later and ends a little larger in a single layer; the null block obeys "
    "the ODE from every start."
)
TOUCHED = (
    "From independent matrices twice as many directions are touched as M has modes: the input directions of M, and "
    "those that the first layer maps onto what M needs."
)


def _middle_note(settings: Settings, middle: Sequence[Trajectory]) -> str:
    values = [float(each.updates[-1, 1, settings.rank]) for each in middle]
    return (
        f"eps {settings.small:g}: in the middle layer, both of whose sides turn, value {settings.rank + 1} is larger "
        f"than in the outer ones: {min(values):.4f} to {max(values):.4f} over the seeds."
    )


def _spectrum_claims(settings: Settings, eps: float, independent: Sequence[Trajectory]) -> list[Claim]:
    """A small start: as many large values as modes, the rest tiny. A large one: the whole null block moves."""
    rank, name = settings.rank, f"eps {eps:g}, {len(independent)} independent starts"
    if eps == settings.small:
        last = torch.stack([each.updates[-1] for each in independent])
        return [
            Claim(
                name="modes_large",
                statement=f"{name}: singular value {rank} of the update, smallest found",
                measured=float(last[..., rank - 1].min()),
                least=0.5,
            ),
            Claim(
                name="rest_small",
                statement=f"{name}, outer layers: singular value {rank + 1} of the update, largest found",
                measured=float(last[:, [0, 2], rank].max()),
                most=0.013,
            ),
            Claim(
                name="published_rest_small",
                statement=f"{name}, middle layer: the same",
                measured=float(last[:, 1, rank].max()),
                most=0.013,
            ),
        ]
    shift = eps - null_strength(eps, settings.time)
    null = torch.stack([each.null for each in independent])
    return [
        Claim(
            name=f"null_shift_{kind}",
            statement=f"{name}: {word} shift in a direction that M lacks, eps - (eps^-4 + 4t)^(-1/4) = {shift:.3f}",
            measured=float(value),
            least=shift - 0.005,
            most=shift + 0.005,
        )
        for kind, word, value in (("least", "smallest", null.min()), ("most", "largest", null.max()))
    ]


def _ode_claims(eps: float, aligned: Trajectory, independent: Sequence[Trajectory], solution: Tensor) -> list[Claim]:
    errors = ((aligned.modes - solution) / solution).abs()
    shift = eps - solution[1:, -1]
    null = max(float(((eps - each.modes[1:, -1]) / shift - 1).abs().max()) for each in independent)
    return [
        Claim(
            name=f"ode_{eps:g}",
            statement=f"eps {eps:g}, aligned start: relative error of the ODE, worst mode and time",
            measured=float(errors.max()),
            most=0.02,
        ),
        Claim(
            name=f"ode_null_{eps:g}",
            statement=f"eps {eps:g}, independent starts: relative error of the shift of the null block, worst time",
            measured=null,
            most=0.02,
        ),
    ]


def _row(settings: Settings, eps: float, name: str, each: Trajectory) -> list[Cell]:
    last, rank = each.updates[-1], settings.rank
    cells: list[Cell] = [name, eps, *last[0, :rank].tolist(), float(last[:, rank].max())]
    return [*cells, float(each.null.min()), float(each.null.max())]


def _update_plot(settings: Settings, eps: float, each: Trajectory) -> Plot:
    lines = []
    for index in reversed(range(settings.width)):
        mode = index < settings.rank
        label = f"mode {index + 1}" if mode else "the others"
        points = curve(each.times, each.updates[:, 0, index])
        colour = f"--c{index}" if mode and index < 7 else "--c7"
        lines.append(
            Line(label=label, points=points, colour=colour, width=2 if mode else 1, tooltip=f"value {index + 1}")
        )
    return Plot(
        title=f"Update of the first layer, eps {eps:g}",
        unit="singular values, independent start",
        lines=lines,
        x_end=settings.time,
        x_label="time",
        from_zero=True,
    )


def _ode_plot(settings: Settings, eps: float, aligned: Trajectory, solution: Tensor) -> Plot:
    lines = []
    for index in range(settings.rank + 1):
        name = f"s = {settings.targets[index]:g}" if index < settings.rank else "s = 0"
        colour = f"--c{index % 8}"
        simulated = curve(aligned.times, aligned.modes[:, index])
        solved = curve(aligned.times, solution[:, index])
        lines.append(Line(label=f"{name}, simulated", points=simulated, colour=colour, width=4, opacity=0.35))
        lines.append(Line(label=f"{name}, ODE", points=solved, colour=colour, dash="5 3"))
    return Plot(
        title=f"Modes against the ODE, eps {eps:g}",
        unit="strength, aligned start",
        lines=lines,
        x_end=settings.time,
        x_label="time",
        from_zero=True,
    )


EXPERIMENT = Experiment(
    title="Incremental learning: the update grows mode by mode",
    summary="Gradient descent on a three-layer linear network whose layers start at eps times an orthogonal matrix. "
    "From a small start the cumulative update W(t) - W(0) of each layer is low-rank: one singular value for each mode "
    "of the target, learned one after the other. From a large start every direction moves.",
    formulas=(
        "loss  = ½ |W₃ W₂ W₁ − M|²,   W_l(0) = eps · orthogonal",
        "mode  : da/dt = a² (s − a³),   a(0) = eps,   escapes at about t = 1 / (s · eps)",
        "null  : da/dt = −a⁵,   a(t) = (eps⁻⁴ + 4t)^(−1/4)",
    ),
    source="Zhao, Zhang, Chen, Schaefer, Anandkumar: InRank, arXiv 2306.11250",
    settings=Settings(),
    run=run,
)
