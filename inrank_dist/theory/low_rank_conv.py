"""Low-rank convolutions of a Wide-ResNet: spectral initialisation and Frobenius decay, alone and together.

Source: Kamalakara, Locatelli, Venkitesh, Ba, Gal, Gomez, Exploring Low Rank Training of Deep Neural Networks, arXiv
2209.13569; the rows are those of Khodak, Tenenholtz, Mackey, Fusi, Initialization and Regularization of Factorized
Neural Layers, arXiv 2105.01029. A convolution with weight ``(out, in kh kw)`` is a convolution to ``r`` channels and
one of 1 x 1, with the weights ``V^T`` and ``U``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..lowrank.allocation import affordable_rank
from ..lowrank.convert import LayerLayout, convert, find_targets
from ..lowrank.init import generator_for, start_factors
from ..lowrank.kinds import matrix_shape
from ..lowrank.layer import LowRankLayer
from ..report.plot import Line, Plot
from .digits import load_digits
from .experiment import Cell, Claim, Experiment, Progress, Result, Table

TARGETS = (r"blocks\.\d+\.(first|second|shortcut)$",)

ROWS = {
    "full rank": (None, "l2"),
    "He, L2": ("he", "l2"),
    "spectral, L2": ("spectral", "l2"),
    "He, Frobenius": ("he", "frobenius"),
    "spectral, Frobenius": ("spectral", "frobenius"),
}
"""Row -> initialisation of the factors, None for dense layers, and decay."""

PLAIN, BOTH = "He, L2", "spectral, Frobenius"


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        groups: channels and number of blocks of each group of the network.
        budgets: parameters of the factors of each convolution, as fractions of those of the dense one.
        samples: images to train on; all others are the test set.
        epochs: passes over them.
        every: epochs between two tests.
        batch: images of a step.
        rates, decays: learning rates and ``lam`` to choose from, with the seed ``tuning_seed``.
        validation: share of the training images by whose accuracy they are chosen, after training on the others.
        momentum: of SGD, with Nesterov's correction.
    """

    groups: tuple[tuple[int, int], ...] = ((16, 1), (32, 1), (64, 1))
    budgets: tuple[float, ...] = (0.1, 0.25)
    samples: int = 400
    epochs: int = 20
    every: int = 10
    batch: int = 50
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    decays: tuple[float, ...] = (1e-3,)
    validation: float = 0.25
    momentum: float = 0.9
    tuning_seed: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)


class Block(nn.Module):
    """Of a Wide-ResNet (arXiv 1605.07146): two pre-activated 3 x 3 convolutions and a shortcut, 1 x 1 where the shape
    changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        active = self.norm1(x).relu()
        kept = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(active)
        return kept + self.second(self.norm2(self.first(active)).relu())


class WideResNet(nn.Module):
    """Images ``(N, 1, H, W)`` to logits ``(N, classes)``. Every group but the first halves the sides.

    Args:
        groups: channels and number of blocks of each group.
        classes: number of classes.
    """

    def __init__(self, groups: Sequence[tuple[int, int]], classes: int = 10) -> None:
        super().__init__()
        channels = groups[0][0]
        self.stem, self.blocks = nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.ModuleList()
        for index, (width, count) in enumerate(groups):
            for place in range(count):
                self.blocks.append(Block(channels, width, 2 if index and not place else 1))
                channels = width
        self.norm, self.head = nn.BatchNorm2d(channels), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).relu().mean((2, 3)))


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """The digits of scikit-learn: images ``(1797, 1, 8, 8)`` and labels, in random order."""
    images, labels = load_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order, None], labels[order]


def make_network(settings: Settings, init: str | None, budget: float, seed: int) -> nn.Module:
    """A network in float64. Spectral factors approximate the dense start of the same seed.

    Args:
        init: ``spectral``: the best approximation of the dense start. ``he``: normal factors with the variance 2 over
            their fan-in. None: dense.
        budget: parameters of the factors of each convolution, as a fraction of those of the dense one.
    """
    with torch.device("meta"):
        dense = WideResNet(settings.groups)
    shapes = {name: matrix_shape(layer) for name, layer in find_targets(dense, TARGETS).items()}
    ranks = {name: max(affordable_rank(shape, budget), 1) for name, shape in shapes.items()} if init else {}
    layout = {name: LayerLayout(rank, rank, base=False) for name, rank in ranks.items()}
    network = convert(dense, layout).to_empty(device="cpu").double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            layer, _, leaf = name.rpartition(".")
            generator = generator_for(seed, "low-rank-conv", layer)
            if leaf == "weight" and parameter.ndim > 1:
                flat = torch.randn(len(parameter), parameter[0].numel(), generator=generator)
                parameter.copy_(flat.view_as(parameter) * (2 / parameter[0].numel()) ** 0.5)
            elif leaf == "bias" and layer == "head":
                parameter.zero_()
        for name, (out, in_) in shapes.items():
            if name not in layout:
                continue
            generator, rank = generator_for(seed, "low-rank-conv", name), ranks[name]
            module = network.get_submodule(name)
            assert isinstance(module, LowRankLayer)
            if init == "spectral":
                factors = start_factors(out, in_, rank, "spectral", (2 / in_) ** 0.5, generator)
                U, V = factors.U, factors.V
            else:
                V = torch.randn(in_, rank, generator=generator) * (2 / in_) ** 0.5
                U = torch.randn(out, rank, generator=generator) * (2 / rank) ** 0.5
            module.U.copy_(U)
            module.V.copy_(V)
    return network


def decay_gradients(network: nn.Module, kind: str) -> dict[str, Tensor]:
    """The gradient of the decay term of every parameter that is decayed, by name.

    ``l2``: of half the squared norm of the parameter. ``frobenius``: of ``|U V^T|_F^2 / 2`` for factors, ``U (V^T V)``
    and ``V (U^T U)``; all other weights as with ``l2``.
    """
    found = {}
    for name, parameter in network.named_parameters():
        layer, _, leaf = name.rpartition(".")
        if parameter.ndim < 2:
            continue
        if kind == "frobenius" and leaf in ("U", "V"):
            other = network.get_parameter(f"{layer}.{'V' if leaf == 'U' else 'U'}")
            found[name] = parameter @ (other.T @ other)
        else:
            found[name] = parameter
    return found


@dataclass(frozen=True)
class Trained:
    """A network at the end.

    Attributes:
        accuracies: on the test set, after every ``every`` epochs.
        parameters: of the network.
    """

    row: str
    budget: float
    seed: int
    rate: float
    decay: float
    accuracies: list[float]
    parameters: int

    @property
    def accuracy(self) -> float:
        return self.accuracies[-1]


def train(
    settings: Settings, row: str, budget: float, seed: int, rate: float, decay: float, *, validate: bool = False
) -> Trained:
    """Train a network with SGD; the rate falls linearly to zero. Networks of one seed see the same batches.

    Args:
        validate: train on the first training images only and measure the accuracy on the others, not on the test set.
    """
    init, kind = ROWS[row]
    network = make_network(settings, init, budget, seed)
    images, labels = digits()
    samples = settings.samples - int(settings.validation * settings.samples) if validate else settings.samples
    tested = slice(samples, settings.samples if validate else None)
    names = [name for name, _ in network.named_parameters()]
    parameters = list(network.parameters())
    momenta = {name: torch.zeros_like(parameter) for name, parameter in zip(names, parameters, strict=True)}
    order = generator_for(seed, "low-rank-conv", "order")
    steps = settings.epochs * (samples // settings.batch)
    step, accuracies = 0, []
    for epoch in range(settings.epochs):
        network.train()
        shuffled = torch.randperm(samples, generator=order)
        for chosen in shuffled.split(settings.batch)[: samples // settings.batch]:
            loss = functional.cross_entropy(network(images[chosen]), labels[chosen])
            gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
            now, step = rate * (1 - step / steps), step + 1
            with torch.no_grad():
                decays = decay_gradients(network, kind)
                gradients |= {name: gradients[name] + decay * each for name, each in decays.items()}
                for name, parameter in zip(names, parameters, strict=True):
                    momenta[name].mul_(settings.momentum).add_(gradients[name])
                    parameter.sub_(gradients[name] + settings.momentum * momenta[name], alpha=now)
        if (epoch + 1) % settings.every:
            continue
        network.eval()
        with torch.no_grad():
            right = network(images[tested]).argmax(1) == labels[tested]
        accuracies.append(float(right.double().mean()))
    return Trained(row, budget, seed, rate, decay, accuracies, sum(parameter.numel() for parameter in parameters))


def run(settings: Settings, progress: Progress) -> Result:
    """Every row at every budget: learning rate and decay by one other seed, then all seeds."""
    found: list[Trained] = []
    cases = [(row, budget) for budget in settings.budgets for row in ROWS if ROWS[row][0]]
    cases.insert(0, ("full rank", 1.0))
    choices = list(itertools.product(settings.rates, settings.decays))
    total = len(cases) * (len(choices) + len(settings.seeds))
    done = 0
    for row, budget in cases:
        tuned = []
        for rate, decay in choices:
            tuned.append(train(settings, row, budget, settings.tuning_seed, rate, decay, validate=True))
            progress(f"{row}, {budget:.0%} of the parameters", done := done + 1, total)
        best = max(tuned, key=lambda each: each.accuracy)
        for seed in settings.seeds:
            found.append(train(settings, row, budget, seed, best.rate, best.decay))
            progress(f"{row}, {budget:.0%} of the parameters", done := done + 1, total)
    rows: list[list[Cell]] = []
    for row, budget in cases:
        group = [each for each in found if (each.row, each.budget) == (row, budget)]
        ends = [100 * each.accuracy for each in group]
        mean, first = sum(ends) / len(ends), group[0]
        rows.append([row, f"{budget:.0%}", first.parameters, first.rate, first.decay, mean, min(ends), max(ends)])
    columns = ["initialisation, decay", "budget", "parameters", "rate", "decay λ"]
    columns += ["accuracy, mean", "least", "most"]
    claims = [*_exact(settings), *(claim for budget in settings.budgets for claim in _claims(settings, budget, found))]
    return Result(
        claims=claims,
        plots=[_plot(settings, budget, found) for budget in settings.budgets],
        tables=[Table(title="Accuracy on the test set, in percent", columns=columns, rows=rows)],
        notes=[
            (
                f"{settings.samples} digits of scikit-learn to train on, {len(digits()[1]) - settings.samples:,} to "
                f"test. Rate and decay of each row did best with seed {settings.tuning_seed} on "
                f"{settings.validation:.0%} of the training digits, which were left out then, of "
                f"{', '.join(map(str, settings.rates))} and {', '.join(map(str, settings.decays))}. The budget is that "
                "of each convolution of the blocks; the stem and the last layer are dense."
            ),
            *(
                f"Contradicts the source: {claim.statement}: {claim.measured:.3g}, expected {claim.expected}."
                for claim in claims
                if not claim.holds
            ),
        ],
    )


def _exact(settings: Settings) -> list[Claim]:
    """What holds whatever is learned, for the first seed."""
    budget, seed = settings.budgets[-1], settings.seeds[0]
    images = digits()[0][: settings.batch]
    starts, errors = [], []
    for init in ("he", "spectral"):
        network, dense = make_network(settings, init, budget, seed), make_network(settings, None, 1.0, seed)
        with torch.no_grad():
            for name, layer in network.named_modules():
                if isinstance(layer, LowRankLayer):
                    kernel, found, rank = dense.get_parameter(f"{name}.weight"), layer.U @ layer.V.T, layer.U.shape[1]
                    X, S, Yh = torch.linalg.svd(kernel.flatten(1), full_matrices=False)
                    best = (X[:, :rank] * S[:rank]) @ Yh[:rank]
                    starts += [float((found - best).norm() / best.norm())] if init == "spectral" else []
                    kernel.copy_(found.view_as(kernel))
            expected = dense(images)
            errors.append(float((network(images) - expected).abs().max() / expected.abs().max()))
    return [
        Claim(
            name="product",
            statement="two convolutions against one with the product as its kernel, largest relative error of a logit",
            measured=max(errors),
            most=1e-12,
        ),
        Claim(
            name="spectral_start",
            statement="spectral start against the best approximation of the dense start, largest relative error",
            measured=max(starts),
            most=1e-5,
        ),
    ]


def _claims(settings: Settings, budget: float, found: Sequence[Trained]) -> list[Claim]:
    means: Mapping[str, float] = {
        row: sum(each.accuracy for each in found if (each.row, each.budget) == (row, budget)) / len(settings.seeds)
        for row in ROWS
        if ROWS[row][0]
    }
    claims = []
    for other in (PLAIN, "spectral, L2", "He, Frobenius"):
        claims.append(
            Claim(
                name=f"published_{budget:g}_{other.replace(', ', '_').lower()}",
                statement=f"{budget:.0%} of the parameters: mean accuracy of {BOTH} less that of {other}, in points",
                measured=100 * (means[BOTH] - means[other]),
                least=0.0,
            )
        )
    return claims


def _plot(settings: Settings, budget: float, found: Sequence[Trained]) -> Plot:
    lines = []
    for place, row in enumerate(ROWS):
        group = [each.accuracies for each in found if each.row == row and each.budget in (budget, 1.0)]
        points = [
            (float(settings.every * (index + 1)), 100 * sum(each) / len(each))
            for index, each in enumerate(zip(*group, strict=True))
        ]
        lines.append(Line(label=row, points=[(x, y) for x, y in points], colour=f"--c{place}"))
    return Plot(
        title=f"{budget:.0%} of the parameters",
        unit="test accuracy in percent, mean over the seeds",
        lines=lines,
        x_end=settings.epochs,
        x_label="epoch",
    )


EXPERIMENT = Experiment(
    title="Spectral initialisation and Frobenius decay of convolutions",
    summary="A small Wide-ResNet learns handwritten digits. Each convolution of its blocks is two: one to r channels "
    "and one of 1 x 1. The factors start as normal matrices or as the best approximation of the dense start, and decay "
    "either by themselves or by their product.",
    formulas=(
        "conv(x; W) = conv₁ₓ₁(conv(x; Vᵀ); U),   W ∈ ℝ^(out × in·kh·kw),   W = U Vᵀ",
        "spectral:  U = X_r S_r^½,   V = Y_r S_r^½,   X S Yᵀ = svd(W₀)",
        "L2:  ½ λ (|U|² + |V|²)  ≥  λ |U Vᵀ|_*",
        "Frobenius:  ½ λ |U Vᵀ|²,   ∇_U = λ U (Vᵀ V),   ∇_V = λ V (Uᵀ U)",
    ),
    source="Kamalakara et al.: Exploring Low Rank Training of Deep Neural Networks, arXiv 2209.13569; Khodak et al., "
    "arXiv 2105.01029",
    settings=Settings(),
    run=run,
)
