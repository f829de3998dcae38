"""Weight decay and small batches lower the rank of the weights that SGD finds, with convolutions and residuals, too.

Source: Galanti, Siegel, Gupte, Poggio, SGD and Weight Decay Secretly Minimize the Rank of Your Neural Network, arXiv
2206.05794. A layer meets each sample as ``m`` vectors (a convolution: its patches; a linear layer: 1), so the gradient
of a batch of ``B`` has a rank of at most ``m B``. Over ``k`` steps of SGD with weight decay

    W_T = (1 - eta lam)^k W_{T-k} - eta sum_{j<k} (1 - eta lam)^j G_{T-1-j}.

The first term fades, so ``W / |W|`` is within ``(1 - eta lam)^k |W_{T-k}| / |W_T|`` of a matrix of rank ``k m B``: the
lower, the smaller the batch and the larger ``eta lam``. At the sizes of this experiment the bound is above the widths,
so only its trend is tested, at equal numbers of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..lowrank.init import generator_for
from ..report.plot import Line, Plot
from .experiment import Cell, Claim, Experiment, Progress, Result, Table, curve

KINDS = ("dense", "convolution", "residual")


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        classes: of images, each a random pattern.
        side: of an image.
        samples: of the training set.
        noise: standard deviation of a pixel; patterns have 1.
        channels: of every hidden convolution.
        width: of every hidden layer of the dense network.
        depth: hidden layers after the first one; their rank is measured.
        rate: ``eta``.
        decays: values of ``lam``, ascending, with batches of ``batch``.
        batches: sizes of batches, ascending, with the decay ``decay``.
        threshold: singular values of ``W / |W|_2`` above it count for the rank.
    """

    classes: int = 4
    side: int = 4
    samples: int = 128
    noise: float = 1.0
    channels: int = 12
    width: int = 24
    depth: int = 3
    rate: float = 0.2
    decays: tuple[float, ...] = (0.0, 0.04)
    batch: int = 8
    batches: tuple[int, ...] = (4, 16, 64)
    decay: float = 0.04
    steps: int = 2500
    every: int = 100
    threshold: float = 1e-3
    seeds: tuple[int, ...] = (0, 1, 2)


def make_data(settings: Settings, seed: int) -> tuple[Tensor, Tensor]:
    """Images ``(samples, 1, side, side)`` and their classes ``(samples,)``."""
    generator = generator_for(seed, "sgd-rank", "data")
    shape = (1, settings.side, settings.side)
    patterns = torch.randn(settings.classes, *shape, generator=generator, dtype=torch.float64)
    labels = torch.arange(settings.samples) % settings.classes
    noise = torch.randn(settings.samples, *shape, generator=generator, dtype=torch.float64)
    return patterns[labels] + settings.noise * noise, labels


class Networks:
    """``E`` networks of one kind that train side by side, each on its own data and with its own decay.

    Args:
        seeds: of each network; networks of one seed have the same data, start and batches.
    """

    def __init__(self, kind: str, settings: Settings, seeds: list[int]) -> None:
        self.kind, self.side = kind, 1 if kind == "dense" else settings.side
        self.kernel = 1 if kind == "dense" else 3
        inputs = settings.side**2 if kind == "dense" else 1
        width = settings.width if kind == "dense" else settings.channels
        area = self.kernel**2
        shapes = [(width, inputs * area), *[(width, width * area)] * settings.depth, (settings.classes, width)]
        self.weights = []
        for index, (rows, columns) in enumerate(shapes):
            drawn = {
                seed: torch.randn(
                    rows, columns, generator=generator_for(seed, "sgd-rank", kind, index), dtype=torch.float64
                )
                for seed in {*seeds}
            }
            start = torch.stack([drawn[seed] for seed in seeds]) * (2 / columns) ** 0.5
            self.weights.append(start.requires_grad_())

    def logits(self, images: Tensor) -> Tensor:
        """``(E, B, 1, side, side)`` to ``(E, B, classes)``."""
        count, batch = images.shape[:2]
        x = images.reshape(count, batch, -1, self.side, self.side).transpose(1, 2)
        for index, weight in enumerate(self.weights[:-1]):
            y = functional.relu((weight @ self._patches(x).flatten(2)).reshape(count, -1, *x.shape[2:]))
            x = x + y if self.kind == "residual" and index else y
        return (self.weights[-1] @ x.mean((3, 4))).transpose(1, 2)

    def _patches(self, x: Tensor) -> Tensor:
        """``(E, C, B, side, side)`` to ``(E, C kernel^2, B, side, side)``: what a convolution multiplies."""
        if self.kernel == 1:
            return x
        padded, side = functional.pad(x, (1, 1, 1, 1)), self.side
        return torch.cat([padded[..., i : i + side, j : j + side] for i in range(3) for j in range(3)], 1)

    def step(self, images: Tensor, labels: Tensor, rate: float, decays: Tensor) -> None:
        """One step of SGD on the cross-entropy. ``labels: (E, B)``, ``decays: (E,)``."""
        logits = self.logits(images)
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / labels.shape[1]
        gradients = torch.autograd.grad(loss, self.weights)
        with torch.no_grad():
            for weight, gradient in zip(self.weights, gradients, strict=True):
                weight.mul_(1 - rate * decays[:, None, None]).sub_(gradient, alpha=rate)

    def ranks(self, threshold: float) -> Tensor:
        """``(E,)``, the mean over the hidden layers after the first."""
        with torch.no_grad():
            values = torch.stack([torch.linalg.svdvals(weight) for weight in self.weights[1:-1]])
        return (values > threshold * values[..., :1]).sum(-1).double().mean(0)


@dataclass(frozen=True)
class Trained:
    """A network at the end.

    Attributes:
        steps, ranks: its rank over time.
        accuracy: on its training set.
    """

    kind: str
    seed: int
    decay: float
    batch: int
    steps: list[int]
    ranks: list[float]
    accuracy: float


def train(
    kind: str, settings: Settings, runs: list[tuple[int, float]], batch: int, progress: Progress
) -> list[Trained]:
    """Train a network for each ``(seed, decay)``, all side by side."""
    seeds = [seed for seed, _ in runs]
    decays = torch.tensor([decay for _, decay in runs], dtype=torch.float64)
    networks = Networks(kind, settings, seeds)
    data = {seed: make_data(settings, seed) for seed in {*seeds}}
    images, labels = (torch.stack([data[seed][index] for seed in seeds]) for index in (0, 1))
    orders = {seed: generator_for(seed, "sgd-rank", "order") for seed in {*seeds}}
    steps: list[int] = []
    ranks: list[Tensor] = []
    every = torch.arange(len(runs))[:, None]
    for step in range(settings.steps + 1):
        if step % settings.every == 0:
            steps.append(step)
            ranks.append(networks.ranks(settings.threshold))
            progress(f"{kind}, batches of {batch}", step, settings.steps)
        drawn = {seed: torch.randint(settings.samples, (batch,), generator=orders[seed]) for seed in orders}
        chosen = torch.stack([drawn[seed] for seed in seeds])
        if step < settings.steps:
            networks.step(images[every, chosen], labels[every, chosen], settings.rate, decays)
    with torch.no_grad():
        accuracy = (networks.logits(images).argmax(-1) == labels).double().mean(-1)
    return [
        Trained(kind, seed, decay, batch, steps, [float(each[index]) for each in ranks], float(accuracy[index]))
        for index, (seed, decay) in enumerate(runs)
    ]


def run(settings: Settings, progress: Progress) -> Result:
    """Every kind of network: all decays with one size of batches, all sizes of batches with one decay."""
    found: list[Trained] = []
    for kind in KINDS:
        runs = [(seed, decay) for decay in settings.decays for seed in settings.seeds]
        found += train(kind, settings, runs, settings.batch, progress)
        for batch in settings.batches:
            found += train(kind, settings, [(seed, settings.decay) for seed in settings.seeds], batch, progress)
    rows: list[list[Cell]] = []
    for kind in KINDS:
        for batch, decay in dict.fromkeys((each.batch, each.decay) for each in found):
            group = [each for each in found if (each.kind, each.batch, each.decay) == (kind, batch, decay)]
            ends = [each.ranks[-1] for each in group]
            accuracies = [each.accuracy for each in group]
            start = sum(each.ranks[0] for each in group) / len(group)
            rows.append([kind, batch, decay, start, min(ends), max(ends), min(accuracies), max(accuracies)])
    columns = ["network", "batch", "decay λ", "rank at the start", "rank, least", "rank, most"]
    columns += ["accuracy, least", "accuracy, most"]
    claims = [claim for kind in KINDS for claim in _claims(settings, kind, found)]
    return Result(
        claims=claims,
        plots=[plot for kind in KINDS for plot in _plots(settings, kind, found)],
        tables=[Table(title="Mean rank of the hidden layers, over the seeds", columns=columns, rows=rows)],
        notes=[
            (
                f"A rank counts singular values above {settings.threshold:g} of the largest, mean over "
                f"{settings.depth} layers. The start fades as exp(-ηλt): after {settings.steps:,} steps to "
                + ", ".join(f"{(1 - settings.rate * d) ** settings.steps:.0e} (λ = {d:g})" for d in settings.decays[1:])
                + "."
            ),
            (
                f"The lowest accuracy on a training set is {min(each.accuracy for each in found):.2f}: with strong "
                "decay and small batches some networks no longer fit it, which lowers their rank as well."
            ),
            *_contradictions(claims),
        ],
    )


def _contradictions(claims: list[Claim]) -> list[str]:
    return [
        f"Contradicts the source: {claim.statement}: {claim.measured:.3g}, expected {claim.expected}."
        for claim in claims
        if not claim.holds
    ]


def _claims(settings: Settings, kind: str, found: list[Trained]) -> list[Claim]:
    ends: dict[tuple[int, float], dict[int, float]] = {}
    for each in found:
        if each.kind == kind:
            ends.setdefault((each.batch, each.decay), {})[each.seed] = each.ranks[-1]
    low, high = settings.decays[0], settings.decays[-1]
    small, large = settings.batches[0], settings.batches[-1]
    pairs = {
        "decay": (f"decay {high:g}", f"decay {low:g}", (settings.batch, high), (settings.batch, low)),
        "batch": (f"batches of {small}", f"batches of {large}", (small, settings.decay), (large, settings.decay)),
    }
    claims = []
    for name, (lower_name, upper_name, lower_key, upper_key) in pairs.items():
        gaps = [ends[lower_key][seed] - ends[upper_key][seed] for seed in settings.seeds]
        claims += [
            Claim(
                name=f"{kind}_{name}",
                statement=f"{kind}: mean rank with {lower_name} less that with {upper_name}",
                measured=sum(gaps) / len(gaps),
                most=-0.25,
            ),
            Claim(
                name=f"{kind}_{name}_seeds",
                statement=f"{kind}: seeds where it is not higher with {lower_name}",
                measured=sum(gap <= 0 for gap in gaps),
                least=len(gaps),
            ),
        ]
    return claims


def _plots(settings: Settings, kind: str, found: list[Trained]) -> list[Plot]:
    by_decay, by_batch = [], []
    for each in found:
        if each.kind != kind:
            continue
        points = curve(each.steps, each.ranks)
        if each.batch == settings.batch:
            colour = f"--c{settings.decays.index(each.decay) % 8}"
            by_decay.append(Line(label=f"λ = {each.decay:g}", points=points, colour=colour))
        if each.batch in settings.batches and each.decay == settings.decay:
            colour = f"--c{settings.batches.index(each.batch) % 8}"
            by_batch.append(Line(label=f"batches of {each.batch}", points=points, colour=colour))
    title, steps = kind.capitalize(), settings.steps
    unit = "mean rank, each seed"
    return [
        Plot(title=f"{title}: weight decay", unit=unit, lines=by_decay, x_end=steps, from_zero=True),
        Plot(title=f"{title}: batch size", unit=unit, lines=by_batch, x_end=steps, from_zero=True),
    ]


EXPERIMENT = Experiment(
    title="SGD and weight decay lower the rank",
    summary="Small dense, convolutional and residual networks classify noisy patterns. With weight decay SGD forgets "
    "its start, and its weights are sums of the last gradients, each of a rank of at most that of a batch. A larger "
    "decay and smaller batches are published to give weights of lower rank. The bound itself says nothing at these "
    "sizes, so only this trend is tested, at equal numbers of steps.",
    formulas=(
        "W ← (1 − ηλ) W − η G,   rank(G) ≤ m B,   m: vectors of a sample (patches; 1 for a linear layer)",
        "W_T = (1 − ηλ)ᵏ W_{T−k} − η Σ_{j<k} (1 − ηλ)ʲ G_{T−1−j}",
        "distance of W/|W| to rank k m B  ≤  (1 − ηλ)ᵏ |W_{T−k}| / |W_T|",
    ),
    source="Galanti, Siegel, Gupte, Poggio: SGD and Weight Decay Secretly Minimize the Rank, arXiv 2206.05794",
    settings=Settings(),
    run=run,
)
