"""Deep LoRA against LoRA: fine-tuning with few examples, at equal numbers of trained parameters.

Source: Yaras et al., Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation, arXiv 2406.04112.
A small transformer learns to read digits (scikit-learn's 8 x 8 images, a row is a token). Its weights are then frozen,
and low-rank updates adapt it to turned images from 16, 64 or 256 examples. LoRA (Hu et al., arXiv 2106.09685) is that
of the package ``peft``. Deep LoRA and its compressed form are ``inrank_dist.DeepLoRA`` in a ``LowRankRun``.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from ..lowrank.init import generator_for
from ..report.plot import Line, Plot
from ..runtime.errors import UserError
from .experiment import Cell, Claim, Experiment, Progress, Result, Table, curve
from .fine_tuning import Data, Method, Reader, Tuned, accuracy, batches, deep, load_data, lora, pretrained


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        width, blocks, heads: of the transformer.
        pretrain_steps: AdamW steps on upright images.
        examples: numbers of turned images to learn from.
        steps: AdamW steps of fine-tuning, with batches of at most ``batch``.
        rates: learning rates to choose from, for each method and number of examples.
        tuning_seed: the seed that chooses, on validation images of its own. No seed tests on them.
        sweep: ranks, with ``sweep_examples`` and the rate that suits rank 4. The compressed form has twice as many
            columns, as published.
    """

    width: int = 64
    blocks: int = 1
    heads: int = 4
    pretrain_steps: int = 300
    examples: tuple[int, ...] = (16, 64, 256)
    steps: int = 100
    batch: int = 32
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    tuning_seed: int = 1000
    sweep: tuple[int, ...] = (2, 4, 16, 64)
    sweep_examples: int = 16
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Variant:
    """A row of the comparison.

    Attributes:
        method: how it fine-tunes.
        columns: number of columns of the factors, with about the trained parameters of LoRA of rank 4.
        per_rank: number of columns for an estimate of the rank of 1 in the sweep. 0: not in the sweep.
    """

    method: Method
    columns: int
    per_rank: int = 0


VARIANTS: dict[str, Variant] = {
    "LoRA (peft)": Variant(lora, 4, 1),
    "depth 2": Variant(deep(2), 4),
    "Deep LoRA, eps 0.1": Variant(deep(3, init_scale=0.1), 4, 1),
    "Deep LoRA, eps 0.6": Variant(deep(3, init_scale=0.6), 4, 1),
    "1 core, fixed bases": Variant(deep(3, outer_init="gradient", outer_lr_scale=0.0, init_scale=0.1), 24, 2),
    "compressed, 3 cores": Variant(deep(5, outer_init="gradient", outer_lr_scale=0.0, init_scale=0.3), 14),
}


NAMES = list(VARIANTS)


@dataclass(frozen=True)
class Outcome:
    """Accuracy on the test images of one fine-tuned model."""

    variant: str
    examples: int
    rank: int
    seed: int
    accuracy: float
    loss: float
    parameters: int


class Comparison:
    """Fine-tunes the pre-trained models of all seeds."""

    def __init__(self, settings: Settings, progress: Progress) -> None:
        self.settings, self.progress = settings, progress
        self.data: dict[int, Data] = {}
        self.models: dict[int, Reader] = {}
        sizes = settings.width, settings.blocks, settings.heads
        for seed in (settings.tuning_seed, *settings.seeds):
            progress(f"pre-training, seed {seed}")
            self.data[seed] = load_data(seed)
            self.models[seed] = pretrained(sizes, settings.pretrain_steps, self.data[seed], seed)

    def tune(self, name: str, examples: int, columns: int, rate: float, seed: int) -> Tuned:
        """Fine-tune the model of a seed with its first examples."""
        images, labels = self.data[seed].pool
        generator = generator_for(seed, "deep-lora", "batches")
        steps = batches((images[:examples], labels[:examples]), self.settings.batch, self.settings.steps, generator)
        return VARIANTS[name].method(self.models[seed], steps, columns, rate, seed)

    def best_rate(self, name: str, examples: int) -> float:
        """The rate with the highest accuracy on the validation images of the tuning seed."""
        seed = self.settings.tuning_seed
        found = {}
        for rate in self.settings.rates:
            self.progress(f"rates of {name}, {examples} examples")
            tuned = self.tune(name, examples, VARIANTS[name].columns, rate, seed)
            found[rate] = accuracy(tuned.model, self.data[seed].validation)
        return max(found, key=lambda rate: found[rate])

    def outcome(self, name: str, examples: int, rank: int, columns: int, rate: float, seed: int) -> Outcome:
        self.progress(f"{name}, {examples} examples, seed {seed}")
        tuned = self.tune(name, examples, columns, rate, seed)
        found = accuracy(tuned.model, self.data[seed].test)
        return Outcome(name, examples, rank, seed, found, tuned.loss, tuned.parameters)


def run(settings: Settings, progress: Progress) -> Result:
    """All variants at equal parameters, then the sweep over ranks.

    Raises:
        UserError: the tuning seed is among the seeds.
    """
    if settings.tuning_seed in settings.seeds:
        raise UserError(f"seed {settings.tuning_seed} chooses the rates; write other seeds")
    comparison = Comparison(settings, progress)
    outcomes, rates, sweep = [], {}, []
    for name, variant in VARIANTS.items():
        for examples in settings.examples:
            rate = rates[name, examples] = comparison.best_rate(name, examples)
            for seed in settings.seeds:
                outcomes.append(comparison.outcome(name, examples, 4, variant.columns, rate, seed))
        if not variant.per_rank:
            continue
        for rank in settings.sweep:
            for seed in settings.seeds:
                columns = min(variant.per_rank * rank, settings.width)
                rate = rates[name, settings.sweep_examples]
                sweep.append(comparison.outcome(name, settings.sweep_examples, rank, columns, rate, seed))
    before = [accuracy(comparison.models[seed], comparison.data[seed].test) for seed in settings.seeds]
    return Result(
        claims=_claims(settings, outcomes, before) + _published(settings, outcomes, sweep),
        plots=_plots(settings, outcomes, sweep),
        tables=[_table(outcomes, rates), _sweep_table(settings, sweep)],
        notes=_notes(settings, outcomes, sweep),
    )


def _of(outcomes: list[Outcome], **wanted: object) -> list[float]:
    """Accuracies of the outcomes with these attributes, in the order of the seeds."""
    return [o.accuracy for o in outcomes if all(getattr(o, key) == value for key, value in wanted.items())]


def _claims(settings: Settings, outcomes: list[Outcome], before: list[float]) -> list[Claim]:
    reference = outcomes[0].parameters
    most = max(settings.examples)
    ours, theirs = ([fmean(_of(outcomes, variant=name, examples=n)) for n in settings.examples] for name in NAMES[:2])
    return [
        Claim(
            name="equal_parameters",
            statement="trained parameters over those of LoRA, farthest variant",
            measured=max((o.parameters / reference for o in outcomes), key=lambda ratio: abs(ratio - 1)),
            least=0.95,
            most=1.05,
        ),
        Claim(
            name="shifted",
            statement="accuracy on turned images before fine-tuning, best seed",
            measured=max(before),
            most=0.3,
        ),
        Claim(
            name="adapts",
            statement=f"accuracy with {most} examples, worst variant and seed",
            measured=min(_of(outcomes, examples=most)),
            least=0.6,
        ),
        Claim(
            name="depth_2_is_lora",
            statement="depth 2 against LoRA of peft: difference of mean accuracies, farthest number of examples",
            measured=max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
            most=0.06,
        ),
    ]


DEEP = "Deep LoRA, eps 0.1"


def _published(settings: Settings, outcomes: list[Outcome], sweep: list[Outcome]) -> list[Claim]:
    """Deep LoRA is above LoRA, most with few examples, and depends less on the rank."""
    means = {(name, n): fmean(_of(outcomes, variant=name, examples=n)) for name in NAMES for n in settings.examples}
    claims = [
        Claim(
            name=f"published_{examples}_examples",
            statement=f"{examples} examples: mean accuracy of {DEEP} less that of {NAMES[0]}",
            measured=means[DEEP, examples] - means[NAMES[0], examples],
            least=0.0,
        )
        for examples in settings.examples
    ]
    ours, theirs = (_spread(settings, sweep, name) for name in (DEEP, NAMES[0]))
    return [
        *claims,
        Claim(
            name="published_ranks",
            statement=f"highest less lowest mean accuracy over the ranks: that of {DEEP} less that of {NAMES[0]}",
            measured=ours - theirs,
            most=0.0,
        ),
    ]


def _spread(settings: Settings, sweep: list[Outcome], name: str) -> float:
    """Highest less lowest mean accuracy over the ranks."""
    means = [fmean(_of(sweep, variant=name, rank=rank)) for rank in settings.sweep]
    return max(means) - min(means)


def _table(outcomes: list[Outcome], rates: dict[tuple[str, int], float]) -> Table:
    rows: list[list[Cell]] = []
    for name, examples in rates:
        values = _of(outcomes, variant=name, examples=examples)
        parameters = next(o.parameters for o in outcomes if o.variant == name)
        rows.append([name, parameters, examples, rates[name, examples], fmean(values), min(values), max(values)])
    columns = ["method", "trained parameters", "examples", "rate", "accuracy", "lowest", "highest"]
    return Table(title="Accuracy on turned images at equal parameters", columns=columns, rows=rows)


def _sweep_table(settings: Settings, sweep: list[Outcome]) -> Table:
    rows: list[list[Cell]] = []
    for name, rank in dict.fromkeys((o.variant, o.rank) for o in sweep):
        values = _of(sweep, variant=name, rank=rank)
        parameters = next(o.parameters for o in sweep if (o.variant, o.rank) == (name, rank))
        rows.append([name, rank, parameters, fmean(values), min(values), max(values)])
    columns = ["method", "rank", "trained parameters", "accuracy", "lowest", "highest"]
    return Table(title=f"Sweep of the rank, {settings.sweep_examples} examples", columns=columns, rows=rows)


def _plots(settings: Settings, outcomes: list[Outcome], sweep: list[Outcome]) -> list[Plot]:
    def lines(of: list[Outcome], key: str, places: tuple[int, ...]) -> list[Line]:
        found = []
        for index, name in enumerate(NAMES):
            means = [_of(of, variant=name, **{key: place}) for place in places]
            if all(means):
                points = curve(range(len(places)), map(fmean, means))
                found.append(Line(label=name, points=points, colour=f"--c{index}", width=2))
        return found

    def plot(title: str, of: list[Outcome], key: str, places: tuple[int, ...]) -> Plot:
        label = f"{key}: {', '.join(map(str, places))}"
        return Plot(title=title, unit="accuracy", lines=lines(of, key, places), x_end=len(places) - 1, x_label=label)

    return [
        plot("Mean accuracy by examples", outcomes, "examples", settings.examples),
        plot("Mean accuracy by rank", sweep, "rank", settings.sweep),
    ]


def _notes(settings: Settings, outcomes: list[Outcome], sweep: list[Outcome]) -> list[str]:
    def gain(name: str) -> str:
        each = [
            fmean(_of(outcomes, variant=name, examples=n)) - fmean(_of(outcomes, variant=NAMES[0], examples=n))
            for n in settings.examples
        ]
        return ", ".join(f"{value:+.3f}" for value in each)

    counts = ", ".join(map(str, settings.examples))
    published = (
        f"Published: Deep LoRA above LoRA, most with few examples. Here its mean accuracy less LoRA's with {counts}"
    )
    spread = {name: _spread(settings, sweep, name) for name in dict.fromkeys(o.variant for o in sweep)}
    return [
        f"{published} examples: " + "; ".join(f"{name}: {gain(name)}" for name in NAMES[2:]) + ".",
        f"Highest less lowest mean accuracy over the ranks {', '.join(map(str, settings.sweep))}: "
        + "; ".join(f"{name}: {value:.3f}" for name, value in spread.items())
        + ".",
        "Each rate is the best of those in the settings on another seed.",
    ]


EXPERIMENT = Experiment(
    title="Deep LoRA against LoRA with few examples",
    summary="A small transformer that reads upright digits is adapted to turned ones with low-rank updates of its "
    "frozen weights, from few examples. Deep LoRA has one factor more than LoRA, and the compressed form trains three "
    "small cores between outer factors from one gradient. A single core between them has no depth: it shows what those "
    "bases do alone. All have nearly the same number of trained parameters.",
    formulas=(
        "LoRA:        W = W0 + B A,                 B(0) = 0",
        "Deep LoRA:   W = W0 + U C Vᵀ,              all eps × orthogonal",
        "compressed:  W = W0 + U1 C_k … C_1 V1ᵀ,    C_j(0) = eps I,   U1, V1 fixed",
        "G = ∇f(W0) ≈ U_G S V_Gᵀ:   V1 = [V_G, R_V],  U1 = [R_U, U_G],  R random, all orthonormal",
    ),
    source="Yaras, Wang, Balzano, Qu: Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation, "
    "arXiv 2406.04112",
    settings=Settings(),
    run=run,
)
