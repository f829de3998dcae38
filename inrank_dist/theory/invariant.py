"""Training a deep linear network moves each layer in a subspace of ``2r`` directions only.

Source: Yaras et al., The Law of Parsimony, arXiv 2306.01154, and Compressible Dynamics, arXiv 2406.04112. Layers start
at ``eps`` times orthogonal matrices, the target ``M`` has rank ``r``, gradient descent has step ``eta`` and weight
decay ``lam``. In fixed bases each layer is block diagonal at all times: a ``2r x 2r`` block that learns, and ``rho_l``
times the identity with

    rho_l <- rho_l (1 - eta lam - eta prod_{k != l} rho_k^2).

So the network ``U1 C_L ... C_1 V1^T`` with ``C_l(0) = eps I`` of size ``2r`` follows the same path, less the null
block: the difference of the products is ``sqrt(d - 2r) prod_l rho_l <= sqrt(d - 2r) eps^L``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lowrank.init import generator_for
from ..report.plot import Line, Plot, Reference
from .experiment import Cell, Claim, Experiment, Progress, Result, Table, curve
from .linear import Weights, gradients, orthonormal, product, relative_error, touched_directions


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        width: ``d``, of all layers.
        depth: ``L``.
        targets: singular values of ``M``.
        eps: scale of the start.
        step: ``eta``.
        decays: values of ``lam``, each a run.
        steps: of gradient descent.
        every: steps between measurements.
    """

    width: int = 30
    depth: int = 3
    targets: tuple[float, ...] = (3.0, 2.0, 1.0)
    eps: float = 0.1
    step: float = 0.05
    decays: tuple[float, ...] = (0.0, 0.01)
    steps: int = 1000
    every: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass
class Path:
    """What is measured at ``times`` (optimizer steps).

    Attributes:
        block_errors: largest deviation of an entry of any layer from ``blkdiag(C, rho I)``, with ``rho`` from the
            recursion.
        compressed_errors: largest deviation of ``C`` from the layers of the compressed network.
        differences: ``|W_L ... W_1 - U1 C_L ... C_1 V1^T|_F``.
        null_norms: ``sqrt(d - 2r) prod_l rho_l``.
        rhos: ``rho_1`` by the recursion.
        measured_rhos: the mean diagonal of the first layer's null block.
        spectra: singular values of the first layer's learning block and of its null block.
        fit: relative error of the compressed network's product to ``M`` at the end.
    """

    times: list[int]
    block_errors: list[float]
    compressed_errors: list[float]
    differences: list[float]
    null_norms: list[float]
    rhos: list[float]
    measured_rhos: list[float]
    spectra: list[Tensor]
    fit: float = math.nan


def next_rhos(rhos: list[float], step: float, decay: float) -> list[float]:
    """One step of the recursion of the null blocks."""
    return [
        rho * (1 - step * decay - step * math.prod(other**2 for k, other in enumerate(rhos) if k != index))
        for index, rho in enumerate(rhos)
    ]


def descend(weights: Weights, residual: Tensor, step: float, decay: float) -> None:
    """One step of gradient descent with weight decay, in place."""
    for weight, gradient in zip(weights, gradients(weights, residual), strict=True):
        weight.mul_(1 - step * decay).sub_(gradient, alpha=step)


def follow(settings: Settings, decay: float, seed: int, progress: Progress) -> Path:
    """Train the full and the compressed network side by side and compare them in the fixed bases."""
    generator, d, eps = generator_for(seed, "invariant"), settings.width, settings.eps
    rank, depth = len(settings.targets), settings.depth
    values = torch.tensor(settings.targets, dtype=torch.float64)
    target = orthonormal(d, rank, generator) * values @ orthonormal(d, rank, generator).T
    weights = [eps * orthonormal(d, d, generator) for _ in range(depth)]
    touched, untouched = touched_directions(weights[0], gradients(weights, product(weights) - target)[0], rank)
    bases = [torch.cat([touched, untouched], 1)]
    for weight in weights:
        bases.append(weight @ bases[-1] / eps)
    outer, inner = bases[-1][:, : 2 * rank], touched
    small_target = outer.T @ target @ inner
    small = [eps * torch.eye(2 * rank, dtype=torch.float64) for _ in range(depth)]
    rhos = [eps] * depth
    path = Path([], [], [], [], [], [], [], [])
    for step in range(settings.steps + 1):
        whole, compressed = product(weights), product(small)
        if step % settings.every == 0:
            _measure(path, step, weights, bases, small, rhos)
            path.differences.append(float((whole - outer @ compressed @ inner.T).norm()))
            path.null_norms.append(math.sqrt(d - 2 * rank) * math.prod(rhos))
            progress(f"decay {decay:g}, seed {seed}", step, settings.steps)
        descend(weights, whole - target, settings.step, decay)
        descend(small, compressed - small_target, settings.step, decay)
        rhos = next_rhos(rhos, settings.step, decay)
    path.fit = relative_error(outer @ compressed @ inner.T, target)
    return path


def _measure(path: Path, step: int, weights: Weights, bases: list[Tensor], small: Weights, rhos: list[float]) -> None:
    block_error, compressed_error, size = 0.0, 0.0, len(small[0])
    for index, (weight, block) in enumerate(zip(weights, small, strict=True)):
        seen = bases[index + 1].T @ weight @ bases[index]
        expected = rhos[index] * torch.eye(len(seen), dtype=torch.float64)
        expected[:size, :size] = seen[:size, :size]
        block_error = max(block_error, float((seen - expected).abs().max()))
        compressed_error = max(compressed_error, float((seen[:size, :size] - block).abs().max()))
        if index == 0:
            path.measured_rhos.append(float(seen.diagonal()[size:].mean()))
            path.spectra.append(
                torch.cat([torch.linalg.svdvals(seen[at, at]) for at in (slice(size), slice(size, None))])
            )
    path.times.append(step)
    path.block_errors.append(block_error)
    path.compressed_errors.append(compressed_error)
    path.rhos.append(rhos[0])


def run(settings: Settings, progress: Progress) -> Result:
    """Follow every decay and seed."""
    paths = {
        (decay, seed): follow(settings, decay, seed, progress) for decay in settings.decays for seed in settings.seeds
    }
    rank = len(settings.targets)
    bound = math.sqrt(settings.width - 2 * rank) * settings.eps**settings.depth
    every = list(paths.values())
    ratios = [max(path.differences) / bound for path in every]
    identity = max(abs(a - b) for path in every for a, b in zip(path.differences, path.null_norms, strict=True))
    free = [path.fit for (decay, _), path in paths.items() if decay == 0]
    claims = [
        Claim(
            name="recursion",
            statement="largest deviation of any entry of any layer from blkdiag(C, ρ I), with ρ from the recursion",
            measured=max(max(path.block_errors) for path in every),
            most=1e-10,
        ),
        Claim(
            name="compressed",
            statement=f"largest deviation of C from the layers of the {2 * rank} x {2 * rank} network",
            measured=max(max(path.compressed_errors) for path in every),
            most=1e-10,
        ),
        Claim(
            name="identity",
            statement="largest deviation of the difference of the products from √(d − 2r) ∏ ρ",
            measured=identity,
            most=1e-10,
        ),
        Claim(
            name="bound",
            statement="largest difference of the products over its bound √(d − 2r) epsᴸ, at any time of any run",
            measured=max(ratios),
            most=1 + 1e-6,
        ),
        Claim(
            name="bound_tight",
            statement="the same, run where it is smallest: the bound is attained, at the start",
            measured=min(ratios),
            least=1 - 1e-6,
        ),
    ]
    if free:
        claims.append(
            Claim(
                name="fit",
                statement="relative error of the compressed network to the target at the end, without decay",
                measured=max(free),
                most=1e-3,
            )
        )
    rows: list[list[Cell]] = [
        [
            decay,
            seed,
            max(p.block_errors),
            max(p.compressed_errors),
            p.differences[0] / bound,
            p.differences[-1] / bound,
            p.fit,
        ]
        for (decay, seed), p in paths.items()
    ]
    columns = ["decay λ", "seed", "blocks", "compressed", "over bound, start", "over bound, end", "fit"]
    return Result(
        claims=claims,
        plots=_plots(settings, paths, bound),
        tables=[
            Table(
                title="Each run (largest deviations; difference of the products over its bound)",
                columns=columns,
                rows=rows,
            )
        ],
        notes=[
            (
                "The bound is attained at the start. The null block then shrinks, by a power law without decay and "
                "exponentially with it."
            ),
            (
                f"Half of the {2 * rank} modes of the compressed network are not in the target and shrink as slowly; "
                "they are what is left of its error."
            ),
        ],
    )


def _plots(settings: Settings, paths: dict[tuple[float, int], Path], bound: float) -> list[Plot]:
    seed, length = settings.seeds[0], settings.steps
    first = paths[settings.decays[0], seed]
    size = 2 * len(settings.targets)
    spectrum = [
        Line(
            label="learns" if index < size else "null block",
            points=curve(first.times, (values[index] for values in first.spectra)),
            colour="--c0" if index < size else "--c7",
        )
        for index in range(settings.width)
    ]
    rho, gap = [], []
    for index, decay in enumerate(settings.decays):
        path, colour = paths[decay, seed], f"--c{index % 8}"
        measured = curve(path.times, path.measured_rhos)
        recursion = curve(path.times, path.rhos)
        rho.append(Line(label=f"measured, λ = {decay:g}", points=measured, colour=colour, width=4, opacity=0.35))
        rho.append(Line(label=f"recursion, λ = {decay:g}", points=recursion, colour=colour, dash="5 3"))
        gap.append(Line(label=f"λ = {decay:g}", points=curve(path.times, path.differences), colour=colour))
    return [
        Plot(
            title="Singular values of the first layer",
            unit=f"λ = {settings.decays[0]:g}",
            lines=spectrum,
            x_end=length,
            log=True,
        ),
        Plot(title="The null block", unit="ρ of the first layer", lines=rho, x_end=length, from_zero=True),
        Plot(
            title="Full network less the compressed one",
            unit="Frobenius norm of the products' difference",
            lines=gap,
            references=[Reference(y=bound, label=f"bound {bound:.3g}")],
            x_end=length,
            from_zero=True,
        ),
    ]


EXPERIMENT = Experiment(
    title="Invariant subspaces: what training never touches",
    summary="A deep linear network of width d and a compressed one of width 2r are trained side by side. In bases that "
    "one gradient at the start gives, every layer of the wide network is block diagonal at all times: a block that the "
    "compressed network reproduces, and a multiple of the identity that follows a recursion of one number.",
    formulas=(
        "W_l(t) = [ C_l(t)  0 ; 0  ρ_l(t) I ] in fixed bases,   C_l : 2r × 2r,   C_l(0) = eps I",
        "ρ_l ← ρ_l (1 − ηλ − η ∏_{k≠l} ρ_k²),   ρ_l(0) = eps",
        "V₁ = span( W₁(0)ᵀ u_i , v_i : i ≤ r ),   u_i, v_i: top singular vectors of the gradient of W₁ at the start",
        "U₁ = W_L(0) ⋯ W₁(0) V₁ / epsᴸ",
        "| W_L ⋯ W₁ − U₁ C_L ⋯ C₁ V₁ᵀ |_F = √(d − 2r) ∏ ρ_l ≤ √(d − 2r) epsᴸ",
    ),
    source="Yaras, Wang, Hu, Zhu, Balzano, Qu: arXiv 2306.01154; Yaras, Wang, Balzano, Qu: arXiv 2406.04112",
    settings=Settings(),
    run=run,
)
