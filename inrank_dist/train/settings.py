"""Settings of the training loop, the optimizer and the files of a run."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..runtime.errors import UserError
from ..runtime.resume import OnResume


def _at_least(section: str, settings: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise UserError(f"{section}.{name} is {value}; write a number of at least {least}")


def _at_most(section: str, settings: object, most: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value > most:
            raise UserError(f"{section}.{name} is {value}; write a number of at most {most}")


@dataclass(kw_only=True)
class TrainSettings:
    """The loop. Batch sizes count sequences, steps are optimizer steps."""

    ON_RESUME: ClassVar[OnResume] = OnResume(
        free=(
            "micro_batch_size",
            "compile",
            "cuda_graph",
            "profile",
            "peak_tflops",
            "activation_checkpointing",
            "max_skipped",
        )
    )

    steps: int = 1000
    """Optimizer steps of the whole run."""
    global_batch_size: int = 32
    """Sequences per optimizer step over all processes; does not depend on their number."""
    micro_batch_size: int = 8
    """Sequences per forward pass of one process; the rest of its share is accumulated."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes in bfloat16; weights and moments stay in fp32."""
    grad_clip: float = 1.0
    """Largest gradient norm over all parameters; 0: no clipping (the norm is logged all the same)."""
    compile: bool = False
    """torch.compile each block and the loss: one graph for all ranks while they grow, static shapes once they are
    final."""
    cuda_graph: bool = False
    """Replay compiled blocks as CUDA graphs once shapes are final, which saves the launching of kernels where blocks
    are small (GPUs; engines local and ddp; needs compile)."""
    profile: list[int] = field(default_factory=list)
    """Steps to profile, such as [20,21]: a trace of torch.profiler from every process in profile/ of the run folder,
    and what the memory was taken up by in the log. They are slower than others."""
    peak_tflops: float | None = None
    """What one device can do at best in the precision used, for the MFU in the log; null: the vendor's figure for known
    GPUs in bf16, elsewhere that of a large matrix product measured at the start."""
    activation_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass to save memory."""
    max_skipped: int = 10
    """Consecutive skipped steps, whose loss or gradient is not finite (inf or nan), after which the run stops."""
    spike_deviations: float = 6.0
    """A loss this many standard deviations above the mean of the last 64 steps is reported as a spike; 0: none is."""
    skip_spikes: bool = False
    """Skip the steps of such losses, too."""

    def __post_init__(self) -> None:
        _at_least("train", self, 1, "steps", "global_batch_size", "micro_batch_size", "max_skipped")
        _at_most("train", self, 1 << 20, "global_batch_size")  # whose tokens of one step are held in memory
        _at_least("train", self, 0, "grad_clip", "spike_deviations")
        _at_least("train", self, 1e-3, "peak_tflops")
        for step in self.profile:
            if step < 1:
                raise UserError(f"train.profile has step {step}; write numbers of steps from 1 on, such as [20,21]")
        if self.cuda_graph and not self.compile:
            raise UserError("train.cuda_graph is true but train.compile is false; write train.compile: true")


@dataclass(kw_only=True)
class ScheduleSettings:
    """Learning rate over the steps: linear warm-up to the peak, then a decay."""

    ON_RESUME: ClassVar[OnResume] = OnResume()

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Decay after the warm-up; wsd (warm-up, stable, decay) stays at the peak until the last decay_fraction of the
    steps."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    min_lr_ratio: float = 0.0
    """Learning rate that the decay reaches after the last step, as a fraction of the peak."""
    decay_fraction: float = 0.2
    """Part of the steps over which wsd decays (linearly)."""

    def __post_init__(self) -> None:
        _at_least("schedule", self, 0, "warmup_steps")
        for name in ("min_lr_ratio", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"schedule.{name} is {getattr(self, name)}; write a fraction from 0 to 1")


@dataclass(kw_only=True)
class CheckpointSettings:
    """Checkpoints of a run."""

    ON_RESUME: ClassVar[OnResume] = OnResume(free=("*",))

    interval: int = 1000
    """Optimizer steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Keep for good those of every so many steps; 0: none."""
    ephemeral_interval: int = 0
    """Optimizer steps between checkpoints that remove themselves when a newer one is complete; 0: none."""
    async_: bool = False
    """Copy to memory and write behind the training; needs memory for one more copy of the local shards."""
    grace_seconds: float = 120.0
    """After SIGTERM, SIGINT or SIGUSR1 the run saves and leaves within so many seconds, or leaves without saving."""

    def __post_init__(self) -> None:
        _at_least("checkpoint", self, 0, "interval", "keep_every", "ephemeral_interval")
        _at_least("checkpoint", self, 1, "keep", "grace_seconds")


@dataclass(kw_only=True)
class EvalSettings:
    """Validation during training."""

    ON_RESUME: ClassVar[OnResume] = OnResume(free=("*",))

    interval: int = 500
    """Optimizer steps between validations; 0: never."""
    batches: int | None = None
    """Validate on this many global batches; null: on the whole validation split."""
    sample_tokens: int = 64
    """Length of the sample of text that the finished model writes; 0: none."""

    def __post_init__(self) -> None:
        _at_least("eval", self, 0, "interval", "sample_tokens")
        _at_most("eval", self, 100_000, "sample_tokens")
        _at_least("eval", self, 1, "batches")


@dataclass(kw_only=True)
class LogSettings:
    """What is written while training."""

    ON_RESUME: ClassVar[OnResume] = OnResume(free=("*",))

    interval: int = 10
    """Optimizer steps between log lines."""

    def __post_init__(self) -> None:
        _at_least("log", self, 1, "interval")
