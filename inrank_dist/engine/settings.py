"""Settings of parallelism (YAML section ``parallel``)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..runtime.errors import UserError
from ..runtime.resume import OnResume
from . import zero_settings

EngineName = Literal["local", "ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"]
"""Names of the engines."""


def zero_stage(engine: str) -> int:
    """Return the ZeRO stage of an engine ``zero0`` to ``zero3``."""
    return int(engine.removeprefix("zero"))


@dataclass(kw_only=True)
class ParallelSettings:
    """The engine, how it shards the model, and timeouts."""

    ON_RESUME: ClassVar[OnResume] = OnResume(free=("*",))

    engine: Literal["auto", EngineName] = "auto"
    """local: one process; ddp: one replica per process; fsdp: sharded with FSDP2; zero0 to zero3: a stage of DeepSpeed
    ZeRO (needs the extra deepspeed); auto: local on one process, fsdp on several."""
    shard_size: int | None = None
    """Number of processes over which one replica is sharded; null: all. A smaller number replicates the shards over the
    other processes (hybrid sharding). fsdp only."""
    reduce_each_micro_batch: bool = True
    """Reduce-scatter gradients after every micro-batch. With false, gradients stay unsharded until the last micro-batch
    and are reduced once per step, which takes more memory and less communication. fsdp only."""
    offload_optimizer: bool = False
    """Keep master weights and moments in CPU memory (zero2, zero3)."""
    deepspeed: dict[str, Any] | None = None
    """Further DeepSpeed settings for zero0 to zero3, such as {zero_optimization: {overlap_comm: true}}. Options that
    other settings determine are rejected."""
    timeout_seconds: int = 600
    """Timeout of a collective and of any other activity of the run. The job ends when it expires."""
    step_timeout_seconds: int = 120
    """Timeout of an optimizer step, or five times the longest step so far if that is more. When it expires, the job
    ends and names the process that hangs. The first step after a start or a rank event has timeout_seconds instead."""

    def __post_init__(self) -> None:
        if self.shard_size is not None and self.shard_size < 1:
            raise UserError(f"parallel.shard_size is {self.shard_size}; write at least 1, or null for all processes")
        for name in ("timeout_seconds", "step_timeout_seconds"):
            if getattr(self, name) < 1:
                raise UserError(f"parallel.{name} is {getattr(self, name)}; write at least 1")

        if self.offload_optimizer and self.engine not in ("zero2", "zero3"):
            raise UserError(
                f"parallel.offload_optimizer is true but parallel.engine is {self.engine}; write parallel.engine: "
                "zero2 or zero3"
            )
        zero_settings.check(self.deepspeed or {})

    def resolve(self, world_size: int) -> EngineName:
        """Return the engine for this number of processes.

        Raises:
            UserError: if the engine or ``shard_size`` does not match the number of processes, or DeepSpeed is needed
                and not installed.
        """
        engine = self.engine
        if engine == "auto":
            engine = "local" if world_size == 1 else "fsdp"
        if engine == "local" and world_size > 1:
            raise UserError(
                f"parallel.engine is local but {world_size} processes were started; write parallel.engine: fsdp "
                "or start one"
            )
        if engine.startswith("zero"):
            zero_settings.require_deepspeed(engine)
        if self.shard_size is not None and engine == "fsdp" and world_size % self.shard_size:
            raise UserError(
                f"parallel.shard_size is {self.shard_size}, which does not divide the {world_size} processes; "
                "write a divisor of the number of processes, or null"
            )
        return engine
