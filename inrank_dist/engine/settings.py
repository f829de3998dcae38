"""Settings of the processes and how they hold the model (YAML section ``parallel``)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..runtime.errors import UserError
from ..runtime.resume import OnResume
from . import zero_settings

EngineName = Literal["local", "ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"]
"""What holds the model."""


def zero_stage(engine: str) -> int:
    """Stage of ZeRO of an engine ``zero0`` to ``zero3``."""
    return int(engine.removeprefix("zero"))


@dataclass(kw_only=True)
class ParallelSettings:
    """Which engine holds the model, and over how many processes it is sharded."""

    ON_RESUME: ClassVar[OnResume] = OnResume(free=("*",))

    engine: Literal["auto", EngineName] = "auto"
    """local: one process; ddp: a replica each; fsdp: sharded with FSDP2; zero0 to zero3: a stage of DeepSpeed ZeRO
    (the extra deepspeed); auto: local on one process, fsdp on several."""
    shard_size: int | None = None
    """Processes among which parameters are sharded, replicated over the rest (hybrid sharding); null: all. Of fsdp
    only."""
    reduce_each_micro_batch: bool = True
    """Divide the gradients among the processes after every micro-batch. With false they are whole in each process until
    the last one: more memory, but they travel once a step. Of fsdp only."""
    offload_optimizer: bool = False
    """Keep master weights and moments in the memory of the CPU (zero2, zero3)."""
    deepspeed: dict[str, Any] | None = None
    """Further DeepSpeed settings for zero0 to zero3, such as {zero_optimization: {overlap_comm: true}}; what our
    settings decide is refused here."""
    timeout_seconds: int = 600
    """A collective that takes longer ends the job; so does anything else of a run that takes longer."""
    step_timeout_seconds: int = 120
    """An optimizer step that takes longer, and five times longer than any before, ends the job, which names the process
    that hangs; the first step after a start or a rank event has timeout_seconds."""

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
        """The engine for this many processes.

        Raises:
            UserError: the engine or ``shard_size`` does not fit the number of processes, or DeepSpeed is not installed.
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
