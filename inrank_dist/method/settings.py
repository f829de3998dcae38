"""Settings of the low-rank method (YAML section ``lowrank``)."""

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from ..lowrank.allocation import ALLOCATIONS, affordable_rank
from ..lowrank.criterion import RESIDUALS, RankRule
from ..lowrank.init import Init
from ..lowrank.layer import Activation
from ..runtime.choices import OneOf
from ..runtime.errors import UserError
from ..runtime.resume import OnResume
from . import starts
from .deep import check_depth
from .policy import RankPolicy

FINAL_MULTIPLES = {"cuda": 64, "cpu": 8}
"""Device type -> multiple that suits its hardware: tiles of tensor cores, or SIMD vectors of 8 floats."""


def _modes() -> list[str]:
    from .rank_method import METHODS  # avoids a circular import

    return ["full", *METHODS]


def _choices(annotation: Any) -> list[str]:
    """Return the strings that a setting of this type accepts; empty if the type does not list its values."""
    if get_origin(annotation) is Annotated:
        return list(annotation.__metadata__[0].names())
    return list(get_args(annotation)) if get_origin(annotation) is Literal else []


def _method(mode: str) -> Any:
    from .rank_method import METHODS

    return METHODS[mode]


def _growths() -> list[str]:
    from .growth import GROWTHS

    return list(GROWTHS)


Base = Literal["frozen", "none", "decay"]


@dataclass(kw_only=True)
class LowRankSettings:
    """Settings of the factored layers, of their initialisation and of the growth of their rank."""

    ON_RESUME: ClassVar[OnResume] = OnResume(
        free=("fuse", "track_updates", "track_weights"), fixed=("targets", "depth")
    )

    mode: Annotated[str, OneOf(_modes)] = "efficient"
    """full: dense model. fixed: factors of constant rank. inrank: the rank may grow until the end. efficient: the rank
    grows during the warm-up and is then frozen. The freeze takes the rank that the rule found, and rounds it up or down
    to a multiple of multiple_of, so it may explain less than the threshold (see final for other choices)."""
    targets: list[str] = field(default_factory=lambda: ["mlp"])
    """Layers to factor: mlp, attention, all (both), inner (both, except in the first block), or regular expressions
    that are searched in the layer name."""
    initial_rank: int = 8
    """Initial active rank r. In mode fixed, the constant rank."""
    dense_fraction: float = 0.0
    """Fraction of train.steps during which the layers are dense. Each is then replaced by its best low-rank
    approximation (arXiv 2209.13569): of rank initial_rank in mode fixed, otherwise of the rank that the rule finds in
    its spectrum. 0: the layers start as factors."""
    dense_until: Literal["fraction", "stable_rank"] = "fraction"
    """With dense_fraction: when the layers are factored. fraction: at that fraction of the steps. stable_rank: once the
    stable ranks of all layers have settled, at the latest at that fraction (Cuttlefish, arXiv 2305.02538). In mode
    fixed the rank of each layer is then its scaled stable rank, at most max_rank_fraction."""
    stable_rank_tolerance: float = 0.02
    """With dense_until stable_rank: a layer has settled once its stable rank, as a fraction of that at initialisation,
    changes by at most this much from one measurement to the next, on average over stable_rank_window measurements.
    They are interval steps apart."""
    stable_rank_window: int = 5
    """With dense_until stable_rank: number of changes of the stable rank in the average."""
    factorized_lr_scale: float = 1.0
    """With dense_fraction: factor of all learning rates once the layers are factored (published: 0.5)."""
    buffer: int = 8
    """Number b of modes trained beyond the active rank. One decision raises the rank by at most b."""
    threshold: float = 0.9
    """The rank is raised if its explained ratio is below this threshold."""
    criterion: Annotated[str, OneOf(lambda: RESIDUALS)] = "energy"
    """Definition of the explained ratio: energy (sum of squared singular values) or variance (as published)."""
    measure: Literal["update", "product"] = "update"
    """Matrix whose spectrum determines the rank: update (the change since initialisation) or product (the product of
    the factors, including their random initial values, as published)."""
    base: Base = "decay"
    """Dense base W0 that is added to the product of the factors: frozen, none (the product is the whole weight), or
    decay (scaled linearly to zero over warmup_steps)."""
    init: Init = "orthogonal"
    """Initialisation of the base, or of the factors without a base. spectral and spectral_ones need base none. loaded:
    the weights of model.init_from become the base, which must be frozen, or are replaced by their best approximation of
    rank initial_rank or initial_energy, with base none."""
    depth: int = 2
    """Number of factors of each layer. 2: U V^T. More: a deep layer U C_k ... C_1 V^T with depth - 2 square cores
    (Deep LoRA, arXiv 2406.04112)."""
    init_scale: float = 0.1
    """With depth above 2 and a base: scale of the orthogonal factors at initialisation. The singular values of their
    product start at init_scale to the power of depth (of depth - 2 with outer_init gradient). Smaller values favour a
    lower rank and start slower."""
    outer_init: Literal["random", "gradient"] = "random"
    """With depth above 2, mode fixed and base frozen: initialisation of U and V. gradient: half of their columns are
    the top singular vectors of the gradient of the weight at the first batch, the others are random (the compressed
    form of arXiv 2406.04112). U and V are then orthonormal, and the cores init_scale times the identity."""
    outer_lr_scale: float = 1.0
    """With depth above 2: learning rate of U and V as a multiple of that of the cores. 0: U and V are not trained."""
    train_only_factors: bool = False
    """Train the factors only. Embeddings, norms, biases and layers that are not factored keep their values, as in LoRA.
    Needs base frozen."""
    initial_energy: float | None = None
    """With mode fixed and base none, and either init loaded or dense_fraction: share of the squared singular values of
    each dense weight to keep, which determines the rank of each layer instead of initial_rank. null: initial_rank."""
    initial_budget: float | None = None
    """With mode fixed: maximum number of parameters in the factors of each layer, as a fraction of those of the dense
    layer, which determines the rank of each layer instead of initial_rank. null: initial_rank."""
    interval: int = 25
    """Number of optimizer steps between two decisions."""
    warmup_steps: int = 200
    """With base decay: number of optimizer steps over which the base decays to zero. Also the default of freeze_step if
    dense_fraction is 0."""
    freeze_step: int | Literal["auto"] | None = None
    """Optimizer step at which mode efficient freezes the rank. null: warmup_steps, or the end of the dense steps if
    dense_fraction is not 0. auto: the decision after freeze_patience decisions without growth, at the latest after
    freeze_fraction of train.steps."""
    freeze_patience: int = 3
    """With freeze_step auto: number of consecutive decisions without growth in any layer after which the rank is
    frozen."""
    freeze_fraction: float = 0.5
    """With freeze_step auto: fraction of train.steps after which the rank is frozen at the latest."""
    final: Annotated[str, OneOf(lambda: ALLOCATIONS)] = "per_layer"
    """Ranks after the freeze. per_layer: the ranks that the rule found. uniform: the same rank in all layers, with
    about as many parameters in total. budget: the ranks that discard the least energy within final_budget. random:
    random ranks within final_budget, drawn from the seed, as a control."""
    final_budget: float = 0.25
    """With final budget or random: maximum number of parameters in the factors after the freeze, as a fraction of those
    of the dense layers. If multiples of multiple_of exceed the budget, ranks are rounded to smaller multiples."""
    growth_init: Annotated[str, OneOf(_growths)] = "random"
    """Initialisation of new modes. random: random directions. gradient: the top singular directions of the current
    gradient outside the span of the factors, at the cost of two more backward passes per growth. Neither changes the
    function of the model. published: both factors random as at the start, which changes the function; only to reproduce
    the published code."""
    max_rank_fraction: float = 0.5
    """Maximum active rank as a fraction of min(in, out)."""
    multiple_of: int | None = None
    """Growth raises ranks to a multiple of this. The freeze rounds ranks up or down to a multiple such that the least
    energy is discarded. null: growth raises ranks to any value, and the freeze rounds to a multiple of 64 on GPUs and
    of 8 on CPUs."""
    track_updates: int = 0
    """Optimizer steps between measurements of the spectrum of W(t) - W(0) of each target while it is dense, also in
    mode full: the evidence of arXiv 2306.11250 for low-rank learning. Needs memory for one dense layer. 0: never."""
    track_weights: int = 0
    """Optimizer steps between measurements of the spectrum of each target while it is dense, also in mode full. The
    effective rank is that of arXiv 2209.13569, nuclear over spectral norm. 0: never."""
    fuse: bool = True
    """Compute factors that read the same input (q, k, v; gate, up) as one product. The result is the same."""
    activation: Activation = "none"
    """Activation between the factors, as in CoLA (arXiv 2502.10940). silu needs mode fixed and base none: the product
    of the factors is then not the weight of a linear layer, so it cannot be measured, truncated or decayed."""
    frobenius_decay: float = 0.0
    """Decoupled decay of the Frobenius norm of the product U V^T, instead of weight decay of the factors. 0: off."""
    frobenius_in_loss: bool = False
    """Add frobenius_decay / 2 * |U V^T|_F^2 to the loss instead, whose gradient is clipped and enters the moments. The
    logged loss does not include it. Not with ZeRO."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            known = _choices(setting.type)
            if known and getattr(self, setting.name) not in known:
                value = getattr(self, setting.name)
                raise UserError(f"lowrank.{setting.name} is {value}; write one of {', '.join(known)}")
        counts = ("initial_rank", "interval", "warmup_steps", "freeze_step", "freeze_patience", "multiple_of")
        for name in (*counts, "stable_rank_window"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise UserError(f"lowrank.{name} is {value}; write a whole number of at least 1")
        if not 0 <= self.dense_fraction < 1:
            raise UserError(
                f"lowrank.dense_fraction is {self.dense_fraction}; write a fraction from 0, for none, to below 1"
            )
        if self.buffer < 0 or (self.grows and self.buffer == 0):
            raise UserError(
                f"lowrank.buffer is {self.buffer}; the rank grows into the buffer, so write a whole number of "
                "at least 1"
            )
        if not 0 < self.threshold < 1:
            raise UserError(f"lowrank.threshold is {self.threshold}; write a ratio between 0 and 1, such as 0.9")
        for name in ("track_updates", "track_weights"):
            if getattr(self, name) < 0:
                raise UserError(f"lowrank.{name} is {getattr(self, name)}; write a number of steps, or 0 for never")
        for name in ("max_rank_fraction", "freeze_fraction", "final_budget"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"lowrank.{name} is {getattr(self, name)}; write a fraction above 0 and at most 1")
        if not 0 < self.factorized_lr_scale < math.inf:
            raise UserError(f"lowrank.factorized_lr_scale is {self.factorized_lr_scale}; write a number above 0")
        if not self.frobenius_decay >= 0:
            raise UserError(f"lowrank.frobenius_decay is {self.frobenius_decay}; write 0 or a positive number")
        if isinstance(self.targets, str):
            raise UserError(f"lowrank.targets is {self.targets!r}; write a list such as [{self.targets}]")
        if not self.targets:
            raise UserError("lowrank.targets is empty; write targets such as [mlp], or lowrank.mode: full")
        if self.mode == "full":
            return
        if self.base != "none" and self.init in ("spectral", "spectral_ones"):
            raise UserError(
                f"lowrank.init is {self.init} but with lowrank.base {self.base} the factors start at zero; "
                "write lowrank.base: none or lowrank.init: orthogonal"
            )
        if self.train_only_factors and self.base != "frozen":
            raise UserError(
                f"lowrank.train_only_factors is true but lowrank.base is {self.base}; write lowrank.base: frozen"
            )
        starts.check(self)
        check_depth(self)
        if self.activation != "none":
            self._check_bottleneck()
        published = self.grows and self.growth_init == "published"
        if published and self.measure != "product":
            raise UserError(
                f"lowrank.growth_init is published but lowrank.measure is {self.measure}, which would take the "
                "random new "
                "modes for learned ones; write lowrank.measure: product or lowrank.growth_init: random"
            )
        if published and self.base != "none":
            raise UserError(
                f"lowrank.growth_init is published but lowrank.base is {self.base}, and the published code has "
                "no base; "
                "write lowrank.base: none or lowrank.growth_init: random"
            )
        if self.grows and self.multiple_of is not None:
            for name in ("initial_rank", "buffer"):
                if getattr(self, name) % self.multiple_of:
                    raise UserError(
                        f"lowrank.{name} is {getattr(self, name)}, not a multiple of lowrank.multiple_of "
                        f"{self.multiple_of}; "
                        f"write {-(-getattr(self, name) // self.multiple_of) * self.multiple_of}"
                    )
        fades_late = isinstance(self.freeze_step, int) and self.freeze_step < self.warmup_steps
        if self.freezes and self.base == "decay" and fades_late:
            raise UserError(
                f"lowrank.freeze_step is {self.freeze_step} but the base fades until lowrank.warmup_steps "
                f"{self.warmup_steps}; "
                f"write a freeze_step of at least {self.warmup_steps}"
            )

    def _check_bottleneck(self) -> None:
        for name, value in (("mode", "fixed"), ("base", "none"), ("dense_fraction", 0), ("frobenius_decay", 0)):
            if getattr(self, name) != value:
                raise UserError(
                    f"lowrank.activation is {self.activation} but lowrank.{name} is {getattr(self, name)}; write "
                    f"lowrank.{name}: {value}, or lowrank.activation: none"
                )

    total_steps: ClassVar[int | None] = None
    """Number of optimizer steps of the run if the settings are made for a certain length
    (``library.PretrainThenFactorise``), otherwise None."""

    @property
    def start_rank(self) -> int | None:
        """Initial active rank of every layer. None if the layers are dense at the start or their ranks differ."""
        differ = self.initial_energy is not None or self.initial_budget is not None
        return None if self.dense_fraction or differ else self.initial_rank

    @property
    def follows_stable_ranks(self) -> bool:
        """Whether the layers are dense until their stable ranks have settled."""
        return self.mode != "full" and self.dense_fraction > 0 and self.dense_until == "stable_rank"

    def rank_of(self, shape: tuple[int, int]) -> int:
        """Return the initial rank of a layer ``(out, in)`` if it does not depend on its spectrum."""
        return self.initial_rank if self.initial_budget is None else affordable_rank(shape, self.initial_budget)

    @property
    def measures_update(self) -> bool:
        """Whether the rule needs the spectrum of the update separately. It does not if the product starts at zero."""
        return not self.starts_at_zero and self.measure == "update" and not self.dense_fraction

    @property
    def starts_at_zero(self) -> bool:
        """Whether the product of the factors starts at zero."""
        return self.base != "none" and self.depth == 2

    @property
    def shrinks(self) -> bool:
        """Whether the freeze may lower ranks to the smallest that reach the threshold. The published code does not."""
        return self.freezes and self.growth_init != "published"

    @property
    def grows(self) -> bool:
        """Whether the rank can change."""
        return self.mode != "full" and _method(self.mode).grows

    @property
    def freezes(self) -> bool:
        """Whether the ranks are frozen at some step."""
        return self.mode != "full" and _method(self.mode).freezes

    def freeze_at(self, steps: int) -> int:
        """Return the latest step of the freeze in a run of ``steps`` optimizer steps."""
        if self.freeze_step == "auto":
            latest = max(round(self.freeze_fraction * steps), 1)
            return max(latest, self.warmup_steps if self.base == "decay" else self.dense_steps(steps))
        return (self.dense_steps(steps) or self.warmup_steps) if self.freeze_step is None else self.freeze_step

    def lr_scale(self, *, factored: bool) -> float:
        """Return the factor of the learning rates, given whether the layers are factored by now."""
        return self.factorized_lr_scale if factored and self.dense_fraction else 1.0

    def dense_steps(self, steps: int) -> int:
        """Return the largest number of optimizer steps with dense layers in a run of ``steps``."""
        if self.mode == "full" or not self.dense_fraction:
            return 0
        return max(round(self.dense_fraction * steps), 1)

    @property
    def rule(self) -> RankRule:
        """The rule that derives ranks from spectra. Without growth there is no buffer."""
        return RankRule(
            threshold=self.threshold,
            criterion=self.criterion,
            buffer=self.buffer if self.grows else 0,
            max_rank_fraction=self.max_rank_fraction,
            multiple_of=self.multiple_of or 1,
        )

    @property
    def has_budget(self) -> bool:
        """Whether the final ranks depend on ``final_budget`` and not on the ranks that the rule found."""
        return ALLOCATIONS[self.final].uses_budget

    def final_multiple(self, device_type: str) -> int:
        """Return the multiple to which final ranks are rounded on a device type such as ``cuda`` or ``cpu``."""
        return self.multiple_of or FINAL_MULTIPLES.get(device_type, 8)

    def limit(self, dimension: int, rank: int, found: int, reached: float | None) -> str | None:
        """Return the setting, with its value, that keeps a rank below the threshold; None if none does.

        Args:
            dimension: ``min(in, out)`` of the layer.
            rank: rank of the layer.
            found: rank that the rule found, which the freeze may have lowered.
            reached: explained ratio of ``rank``; None if it is unknown.
        """
        if reached is None or reached >= self.threshold or not self.grows:
            return None
        if rank < found:
            if self.has_budget:
                return f"lowrank.final_budget {self.final_budget:g}"
            multiple = self.multiple_of or "null ({cuda} on GPUs, {cpu} on CPUs)".format(**FINAL_MULTIPLES)
            return f"lowrank.multiple_of {multiple}" if self.final == "per_layer" else f"lowrank.final {self.final}"
        capped = rank >= self.rule.cap(dimension)
        return f"lowrank.max_rank_fraction {self.max_rank_fraction:g}" if capped else None

    def policy(self, steps: int) -> RankPolicy:
        """Return the schedule of a run of ``steps`` optimizer steps."""
        return RankPolicy(
            interval=self.interval if self.grows else None,
            freeze_step=self.freeze_at(steps) if self.freezes else None,
            decay_steps=self.warmup_steps if self.base == "decay" and self.mode != "full" else None,
            patience=self.freeze_patience if self.freezes and self.freeze_step == "auto" else None,
            dense_steps=self.dense_steps(steps),
            check_interval=self.interval if self.follows_stable_ranks else None,
        )

    def without_effect(self) -> list[tuple[str, str]]:
        """Return the settings that have no effect in combination with the others, each with the reason."""
        if self.mode == "full":
            tracked = [name for name in ("track_updates", "track_weights") if getattr(self, name)]
            used = ["mode", "targets", *tracked] if tracked else ["mode"]
            return [(field.name, "lowrank.mode is full") for field in fields(self) if field.name not in used]
        idle = []
        freezing = ("freeze_step", "freeze_patience", "freeze_fraction", "final", "final_budget")
        if not self.grows:
            growth = ["buffer", "threshold", "criterion", "measure", "growth_init"]
            growth += [] if self.follows_stable_ranks else ["interval"]
            growth += [] if starts.finds_ranks(self) else ["max_rank_fraction", "multiple_of"]
            idle += [(key, f"lowrank.mode is {self.mode}") for key in (*growth, *freezing)]
        elif not self.freezes:
            idle += [(key, f"lowrank.mode {self.mode} never freezes") for key in freezing]
        if self.freezes and self.freeze_step != "auto":
            idle += [(key, "lowrank.freeze_step is not auto") for key in ("freeze_patience", "freeze_fraction")]
        if self.freezes and not self.has_budget:
            idle.append(("final_budget", f"lowrank.final is {self.final}"))
        if self.grows and self.starts_at_zero:
            idle.append(("measure", f"with lowrank.base {self.base} the product starts at zero: it is the update"))
        if self.base != "decay" and (not self.freezes or self.freeze_step is not None or self.dense_fraction):
            idle.append(("warmup_steps", f"lowrank.base is {self.base}, which does not fade"))
        if self.depth == 2:
            idle += [(key, "lowrank.depth is 2") for key in ("init_scale", "outer_init", "outer_lr_scale")]
        elif self.base == "none":
            idle.append(("init_scale", "lowrank.base is none, so the product starts as a whole weight"))
        if not self.frobenius_decay:
            idle.append(("frobenius_in_loss", "lowrank.frobenius_decay is 0"))
        return idle + starts.without_effect(self)
