"""``inrank bench speed``: steps of the full-rank model compared with its low-rank forms, in alternating rounds.

Every form runs in the trainer's own engine on the same batch: forward and backward pass, gradient norm, clipping,
AdamW. The bottleneck is a CoLA-style model (Liu et al., arXiv 2502.10940) with an activation between the factors.
"""

import dataclasses
import logging
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from ..config import Config, load_config
from ..engine.cost import Held, held_bytes, sent_bytes
from ..engine.engine import Batches, Engine
from ..engine.reshapable import Values
from ..engine.settings import EngineName
from ..lowrank.allocation import fitting_multiple
from ..lowrank.convert import LayerLayout, Layout, convert, find_targets
from ..lowrank.init import generator_for
from ..lowrank.layer import set_activation, set_fused
from ..models import LanguageModel, flops_per_token
from ..runtime.context import Context
from ..runtime.progress import counted
from ..train.building import build_engine, cost_setup, dense_skeleton
from ..train.memory import peak_extra_bytes
from ..train.speed import Peak, peak_of
from .traffic import Collectives

log = logging.getLogger("inrank_dist")

Model = Literal["full", "fixed", "untruncated", "growing", "frozen", "half", "bottleneck"]
COUNTED_ENGINES: tuple[EngineName, ...] = ("ddp", "fsdp", "zero3")


@dataclass(frozen=True)
class Form:
    """One row of the table: a model and how it is run.

    Attributes:
        model: full: dense. fixed: factors of exactly the requested rank. growing: factors with a buffer over a dense
            base, as before the freeze. untruncated: the same without the base. frozen: factors of the rounded rank, as
            after the freeze. half: half that rank. bottleneck: like frozen, with an activation between the factors.
        compiled: whether blocks and loss are compiled.
        fused: whether factors that read the same input are computed in one product.
        fused_adam: whether to use torch's fused AdamW.
    """

    model: Model
    compiled: bool = False
    fused: bool = True
    fused_adam: bool = True

    @property
    def name(self) -> str:
        """Label in the table."""
        extras = [("not joined", not self.fused), ("compiled", self.compiled), ("plain AdamW", not self.fused_adam)]
        return ", ".join([LABELS[self.model], *(label for label, applies in extras if applies)])


LABELS: dict[Model, str] = {
    "full": "full rank",
    "fixed": "fixed rank",
    "untruncated": "with buffer, no base",
    "growing": "InRank before the freeze",
    "frozen": "InRank after the freeze",
    "half": "the same at half the rank",
    "bottleneck": "bottleneck (CoLA's kind)",
}

STANDARD = (
    Form("full"),
    Form("full", compiled=True),
    Form("fixed", fused=False),
    Form("growing"),
    Form("frozen", fused=False),
    Form("frozen"),
    Form("frozen", compiled=True),
    Form("half"),
    Form("half", compiled=True),
    Form("bottleneck"),
    Form("bottleneck", compiled=True),
)

ABLATION = (
    Form("full", fused_adam=False),
    Form("full"),
    Form("full", compiled=True),
    Form("growing", fused=False, fused_adam=False),
    Form("untruncated", fused=False, fused_adam=False),
    Form("fixed", fused=False, fused_adam=False),
    Form("frozen", fused=False, fused_adam=False),
    Form("frozen", fused_adam=False),
    Form("frozen"),
    Form("frozen", compiled=True),
)
"""Each row changes one thing: no base, no buffer, rank rounded, factors joined, AdamW fused, compiled."""


@dataclass(frozen=True)
class Shape:
    """A model to measure, and the batch of one process.

    Attributes:
        rank: of the factors; None means a quarter of the width.
        targets: ``lowrank.targets``.
    """

    hidden: int
    layers: int
    vocab: int
    seq: int
    batch: int
    targets: str
    rank: int | None = None
    buffer: int = 64

    @property
    def requested_rank(self) -> int:
        return self.rank or self.hidden // 4


@dataclass
class Row:
    """Measurements of one form.

    Attributes:
        flops: per token, forward and backward.
        seconds: per step, one value per round.
        held: bytes of weights, gradients and moments in this process, by formula.
        extra: peak bytes of a step beyond weights and moments, measured.
        sent: engine -> bytes that one process sends per step: (measured, by formula).
    """

    form: Form
    flops: int
    held: Held
    seconds: list[float] = field(default_factory=list)
    extra: int = 0
    sent: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def peak(self) -> int:
        """Peak bytes of this process."""
        return self.held.parameters + self.held.moments + self.extra


@dataclass
class Outcome:
    """Measurements of one shape.

    Attributes:
        rank: as requested; rounded: as the freeze rounds it; half: half of that, rounded in the same way.
        tokens: per step, over all processes.
        peak: of one device.
    """

    shape: Shape
    rank: int
    rounded: int
    half: int
    engine: str
    tokens: int
    peak: Peak
    rows: dict[Form, Row]

    def speedup(self, form: Form) -> float:
        """Median time of the full-rank model in the same form, divided by the median time of ``form``."""
        return self.reference(form).median / self.rows[form].median

    def flops_ratio(self, form: Form) -> float:
        """The same ratio in floating-point operations."""
        return self.reference(form).flops / self.rows[form].flops

    def reference(self, form: Form) -> Row:
        """The full-rank model with the same compilation and AdamW as ``form``, or else the plain full-rank model."""
        matching = Form("full", compiled=form.compiled, fused_adam=form.fused_adam)
        return self.rows.get(matching) or self.rows[Form("full")]

    def break_even(self, *, compiled: bool) -> float | None:
        """Rank at which a step takes as long as with full rank, by linear interpolation through the two measured ranks.
        Below 1 if low rank is always slower; None if the times do not determine it."""
        form, half = Form("frozen", compiled=compiled), Form("half", compiled=compiled)
        if form not in self.rows or half not in self.rows:
            return None
        ranks = self.rounded, self.half
        if ranks[0] == ranks[1]:
            return None
        slope = (self.rows[form].median - self.rows[half].median) / (ranks[0] - ranks[1])
        return ranks[0] + (self.reference(form).median - self.rows[form].median) / slope if slope > 0 else None

    @property
    def break_even_flops(self) -> float:
        """The break-even rank by arithmetic, at which the factors have as many parameters as the dense layers."""
        h = self.shape.hidden
        pairs = {"mlp": [(4 * h, h)] * 2, "all": [(h, h)] * 4 + [(4 * h, h)] * 2}[self.shape.targets]
        return sum(a * b for a, b in pairs) / sum(a + b for a, b in pairs)


def measure_speed(
    shape: Shape, forms: Sequence[Form], context: Context, *, engine: EngineName, bf16: bool, rounds: int
) -> Outcome:
    """Time a step of every form in alternating rounds, after one warm-up round. With several processes, also count the
    bytes that ``COUNTED_ENGINES`` send.

    Args:
        engine: its name.
        rounds: number of rounds of every form.
    """
    config = _config(shape, context, engine, bf16)
    skeleton = dense_skeleton(config.model, shape.vocab, separator_id=0)
    multiple = config.lowrank.final_multiple(context.device.type)
    rounded = _rounded(shape.requested_rank, multiple)
    half = _rounded(max(rounded // 2, 1), multiple)
    layouts = {form.model: _layout(form.model, shape, skeleton, rounded, half) for form in forms}
    generator = generator_for(0, "bench", context.rank)
    ids = torch.randint(shape.vocab, (shape.batch, shape.seq + 1), generator=generator).to(context.device)
    batch = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())]
    tokens = shape.batch * shape.seq * context.world_size
    setup = cost_setup(config, context.world_size)
    engines = {model: _engine(config, context, skeleton, layout, model) for model, layout in layouts.items()}
    rows: dict[Form, Row] = {}
    for form in forms:
        module = convert(skeleton, layouts[form.model])
        rows[form] = Row(form, flops_per_token(module, shape.seq), held_bytes(module, setup))
    activity = f"width {shape.hidden}, targets {shape.targets}"
    # The first round is a warm-up.
    for index in counted(range(-1, rounds), activity, unit="rounds", enabled=context.is_main):
        for form in forms:
            with _running(engines[form.model], form):
                _synchronize(context)
                start = time.perf_counter()
                _step(engines[form.model], batch, tokens)
                _synchronize(context)
                if index >= 0:
                    rows[form].seconds.append(time.perf_counter() - start)
    for form in forms:
        with _running(engines[form.model], form):
            step = partial(_step, engines[form.model], batch, tokens)
            rows[form].extra = peak_extra_bytes(step, context.device)
    for built in engines.values():
        built.release()
    engines.clear()
    torch.compiler.reset()
    if context.world_size > 1:
        for row in rows.values():
            if row.form.model in ("full", "growing", "frozen") and not row.form.compiled and row.form.fused:
                row.sent = _sent(config, context, skeleton, layouts[row.form.model], batch, tokens)
    peak = peak_of(context.device, bf16=bf16)
    return Outcome(shape, shape.requested_rank, rounded, half, engine, tokens, peak, rows)


def _config(shape: Shape, context: Context, engine: EngineName, bf16: bool) -> Config:
    settings = {
        "model.num_layers": shape.layers,
        "model.num_heads": max(shape.hidden // 64, 1),
        "model.hidden_size": shape.hidden,
        "model.max_seq_len": shape.seq,
        "tokenizer.vocab_size": shape.vocab,
        "train.global_batch_size": shape.batch * context.world_size,
        "train.micro_batch_size": shape.batch,
        "train.precision": "bf16" if bf16 else "fp32",
        "train.compile": "true",  # forms that are not compiled still run eagerly, see _running
        "lowrank.targets": f"[{shape.targets}]",
        "parallel.engine": engine,
    }
    return load_config(None, [f"--{key}={value}" for key, value in settings.items()])[0]


def _rounded(rank: int, multiple_of: int) -> int:
    """Round a rank as the freeze rounds a single rank: to the nearest multiple."""
    group = fitting_multiple(multiple_of, rank)
    return round(rank / group) * group


def _layout(model: Model, shape: Shape, skeleton: LanguageModel, rounded: int, half: int) -> Layout:
    if model == "full":
        return {}
    buffered = model in ("growing", "untruncated")
    rank = {"frozen": rounded, "bottleneck": rounded, "half": half}.get(model, shape.requested_rank)
    modes = min(rank + shape.buffer, shape.hidden) if buffered else rank
    layer = LayerLayout(rank, modes, base=model == "growing")
    return dict.fromkeys(find_targets(skeleton, [shape.targets]), layer)


def _engine(config: Config, context: Context, skeleton: LanguageModel, layout: Layout, model: Model) -> Engine:
    engine = build_engine(config, context, skeleton, layout, _values(convert(skeleton, layout)))
    if model == "bottleneck":
        set_activation(engine.module, "silu")
    engine.set_base_scale(0.5)  # halfway through its decay
    return engine


def _values(module: LanguageModel) -> Values:
    """Cheap initial values: a few random numbers, repeated."""
    noise = torch.randn(2**20, generator=generator_for(0, "bench values")) * 0.02
    shapes = {name: parameter.shape for name, parameter in module.named_parameters(remove_duplicate=False)}

    def value(name: str) -> Tensor:
        if "norm" in name or name.endswith("bias"):
            return torch.full(shapes[name], float(name.endswith("weight")))
        size = shapes[name].numel()
        return noise.repeat(-(-size // len(noise)))[:size].view(shapes[name])

    return value


@contextmanager
def _running(engine: Engine, form: Form) -> Iterator[None]:
    """Switch an engine to a form."""
    set_fused(engine.module, form.fused)
    for group in engine.optimizer.param_groups:
        if "fused" in group:
            group["fused"], group["foreach"] = form.fused_adam, False
    with torch.compiler.set_stance("default" if form.compiled else "force_eager"):
        yield


def _synchronize(context: Context) -> None:
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
    context.barrier()


def _step(engine: Engine, batch: Batches, tokens: int) -> None:
    engine.accumulate(batch, tokens)
    norm, _ = engine.gradient_norm()
    engine.step(1e-4, norm)


def _sent(
    config: Config,
    context: Context,
    skeleton: LanguageModel,
    layout: Layout,
    batch: Batches,
    tokens: int,
) -> dict[str, tuple[float, float]]:
    """Engine -> bytes that one process sends in a step: measured in the third step, and by formula."""
    counted: dict[str, tuple[float, float]] = {}
    for name in COUNTED_ENGINES:
        if name.startswith("zero") and not find_spec("deepspeed"):
            continue
        other = dataclasses.replace(
            config,
            parallel=dataclasses.replace(config.parallel, engine=name),
            train=dataclasses.replace(config.train, compile=False),
        )
        engine = build_engine(other, context, skeleton, layout, _values(convert(skeleton, layout)))
        for _ in range(3):  # ZeRO-3 records the order of parameters first; the third step is representative
            with Collectives() as collectives:
                _step(engine, batch, tokens)
        setup = cost_setup(other, context.world_size)
        counted[name] = (collectives.sent, sent_bytes(convert(skeleton, layout), setup))
        engine.release()
    return counted


def break_even_width(outcomes: Mapping[int, Outcome], form: Form) -> int | None:
    """The smallest measured width from which on the low-rank form is faster than full rank at every width."""
    found = None
    for width in sorted(outcomes, reverse=True):
        if form not in outcomes[width].rows or outcomes[width].speedup(form) <= 1:
            break
        found = width
    return found
