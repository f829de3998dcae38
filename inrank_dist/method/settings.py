"""Settings of the low-rank method (YAML section ``lowrank``)."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from ..lowrank.allocation import ALLOCATIONS
from ..lowrank.criterion import RESIDUALS, RankRule
from ..lowrank.init import Init
from ..lowrank.layer import Activation
from ..runtime.choices import OneOf
from ..runtime.errors import UserError
from ..runtime.resume import OnResume
from .policy import RankPolicy

FINAL_MULTIPLES = {"cuda": 64, "cpu": 8}
"""What suits the arithmetic units of a device: tiles of tensor cores, vectors of 8 floats (190 rounded to 192 took 4 %
off a step of GPT-2 small on CPU)."""


def _modes() -> list[str]:
    from .rank_method import METHODS  # which needs the settings

    return ["full", *METHODS]


def _choices(annotation: Any) -> list[str]:
    """The texts that a setting of this type can have; empty: any value of another type."""
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
    """Which layers are factored, how the factors start, when and how far their rank grows."""

    ON_RESUME: ClassVar[OnResume] = OnResume(free=("fuse",), fixed=("targets",))

    mode: Annotated[str, OneOf(_modes)] = "efficient"
    """full: dense model; fixed: factors of constant rank; inrank: the rank may grow to the end; efficient: it grows
    during the warm-up and is then frozen, at the smallest rank that reaches the threshold."""
    targets: list[str] = field(default_factory=lambda: ["mlp"])
    """Layers to factor: mlp, attention, all, inner (all but those of the first block), or regular expressions searched
    in the layer's name."""
    initial_rank: int = 8
    """Active rank r at the start (in mode fixed: the rank)."""
    dense_fraction: float = 0.0
    """Fraction of train.steps that the layers are trained dense before the best approximation of each takes its place
    (arXiv 2305.02538): of rank initial_rank in mode fixed, otherwise of the rank that the rule finds in its spectrum.
    0: they start as factors."""
    buffer: int = 8
    """Modes b trained beyond the active rank; the most that one decision can add."""
    threshold: float = 0.9
    """Explained ratio below which the rank is raised."""
    criterion: Annotated[str, OneOf(lambda: RESIDUALS)] = "energy"
    """Explained ratio by energy (sum of squared singular values) or by variance (as published)."""
    measure: Literal["update", "product"] = "update"
    """Spectrum of what was learned since the start, or of the product of the factors, random start included (as
    published)."""
    base: Base = "decay"
    """Dense base W0 under the factors: frozen, none (the factors are the weight), or decay (fades out over
    warmup_steps)."""
    init: Init = "orthogonal"
    """How the base starts, or without a base how the factors start (spectral and spectral_ones need base none)."""
    interval: int = 25
    """Optimizer steps between two decisions."""
    warmup_steps: int = 200
    """Optimizer steps over which a decaying base fades; also the default of freeze_step, unless there is a
    dense_fraction."""
    freeze_step: int | Literal["auto"] | None = None
    """Optimizer step at which mode efficient freezes the rank; null: warmup_steps, or the end of
    dense_fraction where there is one; auto: at the decision after freeze_patience decisions without growth, at the
    latest after freeze_fraction of train.steps."""
    freeze_patience: int = 3
    """With freeze_step auto: decisions in a row without growth in any layer after which the rank is frozen."""
    freeze_fraction: float = 0.5
    """With freeze_step auto: fraction of train.steps after which the rank is frozen at the latest."""
    final: Annotated[str, OneOf(lambda: ALLOCATIONS)] = "per_layer"
    """Ranks at the freeze: per_layer as the rule found them; uniform: one rank of about as many parameters; budget: the
    ranks that discard the least energy within final_budget; random: ranks drawn by the seed within final_budget, the
    control of the others."""
    final_budget: float = 0.25
    """With final budget or random: at most this many parameters in the factors after the freeze, as a fraction of the
    dense layers'; ranks are rounded to less than multiple_of where it would not be kept otherwise."""
    growth_init: Annotated[str, OneOf(_growths)] = "random"
    """Where new modes look: in random directions, or along the top singular directions of the present gradient outside
    the span of the factors (costs two more backward passes a growth); neither changes the function. published: both
    factors random as at the start, as in the published code, so that the function jumps; only to reproduce it."""
    max_rank_fraction: float = 0.5
    """Largest active rank as a fraction of min(in, out)."""
    multiple_of: int | None = None
    """Ranks are raised to a multiple of this, and rounded to one at the freeze, where the least energy is discarded.
    null: they are raised by any number and rounded to a multiple of 64 on GPUs, of 8 on CPU."""
    fuse: bool = True
    """Factors that read the same input (q, k, v; gate, up) run as one product; the same function."""
    activation: Activation = "none"
    """Between the factors, as in CoLA (arXiv 2502.10940). silu: only in mode fixed with base none, because the product
    of the factors is then no weight, whose spectrum could be measured, truncated or decayed."""
    frobenius_decay: float = 0.0
    """Decoupled decay of the Frobenius norm of the product U V^T, in place of weight decay on the factors; 0: off."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            known = _choices(setting.type)
            if known and getattr(self, setting.name) not in known:
                value = getattr(self, setting.name)
                raise UserError(f"lowrank.{setting.name} is {value}; write one of {', '.join(known)}")
        for name in ("initial_rank", "interval", "warmup_steps", "freeze_step", "freeze_patience", "multiple_of"):
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
        for name in ("max_rank_fraction", "freeze_fraction", "final_budget"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"lowrank.{name} is {getattr(self, name)}; write a fraction above 0 and at most 1")
        if not self.frobenius_decay >= 0:
            raise UserError(f"lowrank.frobenius_decay is {self.frobenius_decay}; write 0 or a positive number")
        if not self.targets:
            raise UserError("lowrank.targets is empty; write targets such as [mlp], or lowrank.mode: full")
        if self.mode == "full":
            return
        if self.base != "none" and self.init in ("spectral", "spectral_ones"):
            raise UserError(
                f"lowrank.init is {self.init} but with lowrank.base {self.base} the factors start at zero; "
                "write lowrank.base: none or lowrank.init: orthogonal"
            )
        if self.dense_fraction:
            self._check_dense_start()
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

    def _check_dense_start(self) -> None:
        start = f"lowrank.dense_fraction is {self.dense_fraction}"
        if self.base != "none":
            raise UserError(f"{start} but lowrank.base is {self.base}; write lowrank.base: none")
        if self.growth_init == "published":
            raise UserError(f"{start} but lowrank.growth_init is published; write lowrank.growth_init: random")

    total_steps: ClassVar[int | None] = None
    """Optimizer steps of the run, where a method was made for a certain length (``library.PretrainThenFactorise``)."""

    @property
    def start_rank(self) -> int | None:
        """Active rank of every layer at the start; None: they are dense then."""
        return None if self.dense_fraction else self.initial_rank

    @property
    def measures_update(self) -> bool:
        """Whether the rule looks at what was learned where that is not the product of the factors."""
        return self.base == "none" and self.measure == "update" and not self.dense_fraction

    @property
    def shrinks(self) -> bool:
        """Whether the freeze may lower a rank: to the smallest that reaches the threshold. The published one never
        does."""
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
        """Latest step of the freeze in mode ``efficient``, in a run of ``steps``."""
        if self.freeze_step == "auto":
            latest = max(round(self.freeze_fraction * steps), 1)
            return max(latest, self.warmup_steps if self.base == "decay" else self.dense_steps(steps))
        return (self.dense_steps(steps) or self.warmup_steps) if self.freeze_step is None else self.freeze_step

    def dense_steps(self, steps: int) -> int:
        """Optimizer steps that the layers are trained dense, in a run of ``steps``."""
        if self.mode == "full" or not self.dense_fraction:
            return 0
        return max(round(self.dense_fraction * steps), 1)

    @property
    def rule(self) -> RankRule:
        """The rule; without growth there is no buffer."""
        return RankRule(
            threshold=self.threshold,
            criterion=self.criterion,
            buffer=self.buffer if self.grows else 0,
            max_rank_fraction=self.max_rank_fraction,
            multiple_of=self.multiple_of or 1,
        )

    @property
    def has_budget(self) -> bool:
        """Whether final ranks spend a budget of parameters, whatever ranks the rule found."""
        return ALLOCATIONS[self.final].uses_budget

    def final_multiple(self, device_type: str) -> int:
        """What final ranks are rounded to a multiple of, on ``cuda`` or ``cpu``."""
        return self.multiple_of or FINAL_MULTIPLES.get(device_type, 8)

    def policy(self, steps: int) -> RankPolicy:
        """The calendar of a run of ``steps``."""
        return RankPolicy(
            interval=self.interval if self.grows else None,
            freeze_step=self.freeze_at(steps) if self.freezes else None,
            decay_steps=self.warmup_steps if self.base == "decay" and self.mode != "full" else None,
            patience=self.freeze_patience if self.freezes and self.freeze_step == "auto" else None,
            dense_steps=self.dense_steps(steps),
        )

    def without_effect(self) -> list[tuple[str, str]]:
        """Keys that do nothing in this mode, each with the reason."""
        if self.mode == "full":
            return [(field.name, "lowrank.mode is full") for field in fields(self) if field.name != "mode"]
        idle = []
        freezing = ("freeze_step", "freeze_patience", "freeze_fraction", "final", "final_budget")
        if not self.grows:
            growth = ["buffer", "threshold", "criterion", "measure", "interval"]
            growth += ["max_rank_fraction", "multiple_of", "growth_init"]
            idle += [(key, f"lowrank.mode is {self.mode}") for key in (*growth, *freezing)]
        elif not self.freezes:
            idle += [(key, f"lowrank.mode {self.mode} never freezes") for key in freezing]
        if self.freezes and self.freeze_step != "auto":
            idle += [(key, "lowrank.freeze_step is not auto") for key in ("freeze_patience", "freeze_fraction")]
        if self.freezes and not self.has_budget:
            idle.append(("final_budget", f"lowrank.final is {self.final}"))
        if self.grows and self.base != "none":
            idle.append(("measure", f"with lowrank.base {self.base} the product starts at zero: it is the update"))
        if self.base != "decay" and (not self.freezes or self.freeze_step is not None or self.dense_fraction):
            idle.append(("warmup_steps", f"lowrank.base is {self.base}, which does not fade"))
        if self.dense_fraction:
            idle.append(("init", "with lowrank.dense_fraction the factors come from the dense weights"))
            if self.grows:
                idle.append(("measure", "with lowrank.dense_fraction the rule looks at the product"))
                idle.append(("initial_rank", "with lowrank.dense_fraction the rule finds the first rank as well"))
        return idle
