"""Settings of the training loop, the schedule, checkpoints, validation and logs."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from ..runtime.choices import OneOf
from ..runtime.errors import UserError
from ..runtime.resume import OnResume
from .trackers import TRACKERS


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
    """Settings of the training loop. Batch sizes count sequences, steps are optimizer steps."""

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
    """Number of optimizer steps of the whole run."""
    global_batch_size: int = 32
    """Sequences per optimizer step over all processes, independent of their number."""
    micro_batch_size: int = 8
    """Sequences per forward pass of one process. Gradients are accumulated up to global_batch_size."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the computation. With bf16, weights and optimizer moments stay in fp32."""
    grad_clip: float = 1.0
    """Maximum gradient norm over all parameters. 0: no clipping; the norm is still logged."""
    compile: bool = False
    """Apply torch.compile to each block and the loss. While ranks grow one graph serves all ranks; once they are final
    shapes are static."""
    cuda_graph: bool = False
    """Replay compiled blocks as CUDA graphs once shapes are final, which reduces the kernel launch overhead of small
    blocks. Requires a GPU, compile, and engine local or ddp."""
    profile: list[int] = field(default_factory=list)
    """Steps to profile, such as [20,21]. Every process writes a torch.profiler trace to profile/ in the run folder, and
    peak memory by kind is logged. Profiled steps are slower."""
    peak_tflops: float | None = None
    """Peak TFLOPS of one device in the precision used, for the MFU in the log. null: the vendor's figure for known GPUs
    in bf16, otherwise on a GPU the measured speed of a large matrix product; on CPU no MFU is logged."""
    activation_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass to save memory."""
    max_skipped: int = 10
    """Stop the run after this many consecutive skipped steps. A step is skipped if its loss or gradient is not finite
    (inf or nan), or with skip_spikes if its loss is a spike."""
    spike_deviations: float = 6.0
    """Report a loss as a spike if it is more than this many standard deviations above the mean of the last 64 losses.
    0: never."""
    skip_spikes: bool = False
    """Also skip the optimizer steps of loss spikes."""

    def __post_init__(self) -> None:
        _at_least("train", self, 1, "steps", "global_batch_size", "micro_batch_size", "max_skipped")
        _at_most("train", self, 1 << 20, "global_batch_size")  # the tokens of a step are held in memory
        _at_least("train", self, 0, "grad_clip", "spike_deviations")
        _at_least("train", self, 1e-3, "peak_tflops")
        for step in self.profile:
            if step < 1:
                raise UserError(f"train.profile has step {step}; write numbers of steps from 1 on, such as [20,21]")
        if self.cuda_graph and not self.compile:
            raise UserError("train.cuda_graph is true but train.compile is false; write train.compile: true")


@dataclass(kw_only=True)
class ScheduleSettings:
    """Settings of the learning rate schedule: linear warmup to the peak, then decay."""

    ON_RESUME: ClassVar[OnResume] = OnResume()

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Decay after the warmup. wsd (warmup, stable, decay) stays at the peak until the last decay_fraction of the
    steps."""
    warmup_steps: int = 0
    """Steps of linear warmup."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the decay, as a fraction of the peak."""
    decay_fraction: float = 0.2
    """Fraction of the steps over which wsd decays linearly."""

    def __post_init__(self) -> None:
        _at_least("schedule", self, 0, "warmup_steps")
        for name in ("min_lr_ratio", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"schedule.{name} is {getattr(self, name)}; write a fraction from 0 to 1")


@dataclass(kw_only=True)
class CheckpointSettings:
    """Settings of checkpoints."""

    ON_RESUME: ClassVar[OnResume] = OnResume(free=("*",))

    interval: int = 1000
    """Optimizer steps between checkpoints. 0: only at the end."""
    keep: int = 2
    """Number of most recent checkpoints to keep."""
    keep_every: int = 0
    """Keep permanently the checkpoints whose step is a multiple of this. 0: none."""
    ephemeral_interval: int = 0
    """Optimizer steps between ephemeral checkpoints, which are removed when a newer one is complete. 0: none."""
    async_: bool = False
    """Write checkpoints in the background from a copy in host memory. Needs memory for one more copy of the local
    shards."""
    grace_seconds: float = 120.0
    """Time limit in seconds for saving after SIGTERM, SIGINT or SIGUSR1. If saving takes longer, the run exits without
    saving."""

    def __post_init__(self) -> None:
        _at_least("checkpoint", self, 0, "interval", "keep_every", "ephemeral_interval")
        _at_least("checkpoint", self, 1, "keep", "grace_seconds")


@dataclass(kw_only=True)
class EvalSettings:
    """Settings of validation during training."""

    ON_RESUME: ClassVar[OnResume] = OnResume(free=("*",))

    interval: int = 500
    """Optimizer steps between validations. 0: never."""
    batches: int | None = None
    """Number of global batches to validate on. null: the whole validation split."""
    sample_tokens: int = 64
    """Length in tokens of the text sample generated at the end of the run. 0: none."""

    def __post_init__(self) -> None:
        _at_least("eval", self, 0, "interval", "sample_tokens")
        _at_most("eval", self, 100_000, "sample_tokens")
        _at_least("eval", self, 1, "batches")


@dataclass(kw_only=True)
class LogSettings:
    """Settings of the log."""

    ON_RESUME: ClassVar[OnResume] = OnResume(free=("*",))

    interval: int = 10
    """Optimizer steps between log lines."""
    trackers: list[Annotated[str, OneOf(lambda: TRACKERS)]] = field(default_factory=list)
    """Experiment trackers that the run is also written to: wandb, mlflow, aim. Each needs its package, and is
    configured by the package's own environment variables."""
    project: str | None = None
    """Project (Weights & Biases) or experiment (MLflow, Aim) of the run in the trackers. null: that of WANDB_PROJECT or
    MLFLOW_EXPERIMENT_NAME, else inrank."""

    def __post_init__(self) -> None:
        _at_least("log", self, 1, "interval")
        for name in self.trackers:
            if self.trackers.count(name) > 1:
                raise UserError(f"log.trackers names {name} twice; write it once")
