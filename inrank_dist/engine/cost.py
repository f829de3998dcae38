"""Memory and communication of each engine, computed from shapes for ``inrank plan``.

Notation: ``P`` parameters, of which ``T`` are trained; ``N`` processes, of which ``S`` share one replica (``S = N``
unless sharding is hybrid); ``m`` moments per parameter (2 for AdamW, 1 for orthogonalised updates); ``A`` micro-batches
per step. Parameters, gradients and moments are float32. Rows are divided as by ``torch.chunk``, and the code counts the
largest shard.

Bytes per process between the backward pass and the optimizer step:

| engine       | parameters      | gradients                | moments   |
|--------------|-----------------|--------------------------|-----------|
| local, ddp   | 4 P             | 4 T                      | 4 m T     |
| zero0        | 4 P             | 4 T                      | 4 m T     |
| fsdp         | 4 P / S         | 4 T / S                  | 4 m T / S |
| zero1        | 4 P + 4 T / N   | 4 T                      | 4 m T / N |
| zero2        | 4 P + 4 T / N   | 4 T / N                  | 4 m T / N |
| zero3        | 4 P / N + 4 T/N | 4 T / N                  | 4 m T / N |

ZeRO stages 1 to 3 keep a master copy of each trained parameter. With ``parallel.reduce_each_micro_batch: false`` and
several micro-batches, the gradients of fsdp are unsharded (4 T) until the last one. From the forward to the backward
pass, ZeRO-3 keeps up to 1e9 parameters gathered (``stage3_max_reuse_distance``), which is all of a smaller model (4 P).
Activations, gathered parameters of the current block and communication buffers of gradients are not included.

Bytes sent per process and step. An all-gather or reduce-scatter of ``x`` bytes sends ``x (N - 1) / N``, and an
all-reduce twice as much (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
workstations"). ``P = B + R`` with ``B`` parameters in the blocks. An element of a parameter has ``w`` bytes: 2 for fsdp
with bf16, otherwise 4.

| engine       | sent                                                                                          |
|--------------|-----------------------------------------------------------------------------------------------|
| ddp, zero0   | all-reduce 4 T                                                                                |
| fsdp         | A x all-gather w (2 B + R); A x reduce-scatter 4 T (once with                                 |
|              | ``reduce_each_micro_batch: false``); hybrid: all-reduce 4 T / S over the replicas             |
| zero1        | all-reduce 4 T; all-gather 4 T                                                                |
| zero2        | A x all-reduce 4 T; all-gather 4 T                                                            |
| zero3        | A x all-gather 4 P (twice above 1e9 parameters); A x reduce-scatter 4 T; parameters below 1e5 |
|              | elements are gathered once a step                                                             |

The entries for ZeRO assume DeepSpeed's defaults of ``stage3_max_reuse_distance`` and
``stage3_param_persistence_threshold``.

Orthogonalised updates with fsdp add, in each group of ``S`` processes, an all-reduce of ``16 R (R + 1)`` bytes for each
pair of factors with ``R`` columns, and ``2 w n (S - 1) / S^2`` bytes for each dense matrix of ``n`` elements
(``optim.matrices``).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from ..models import LanguageModel
from ..optim import OptimizerSettings, moment_names, parameter_roles
from .activations import Activations
from .placement import chunk
from .settings import EngineName, zero_stage

FLOAT, BF16 = 4, 2
BUCKET = 50_000_000
"""Maximum number of elements in a gradient bucket of DeepSpeed (``zero_config.MOST_IN_A_BUCKET``)."""
PERSISTENT, REUSED = 100_000, 1_000_000_000
"""DeepSpeed's defaults for ZeRO-3, in elements. Parameters smaller than the first stay gathered. Models smaller than
the second are gathered once per micro-batch, larger ones twice."""


@dataclass(frozen=True)
class Held:
    """Memory of one process between the backward pass and the optimizer step, in bytes.

    Attributes:
        parameters: parameters, including ZeRO's master copies.
        gradients: gradients.
        moments: moments of the optimizer.
        host: part of the total that is in CPU memory (``parallel.offload_optimizer``).
        gathered: parameters that ZeRO-3 may keep gathered from the forward to the backward pass. Not in the total.
    """

    parameters: int
    gradients: int
    moments: int
    host: int = 0
    gathered: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.moments


@dataclass(frozen=True)
class Setup:
    """Inputs of the formulas other than the shapes.

    Attributes:
        engine: name of the engine.
        processes: number of processes ``N``.
        shard_size: with fsdp, number of processes ``S`` that share one replica. None: all.
        optimizer: the optimizer, which determines ``m``.
        accumulation: micro-batches per step ``A``.
        bf16: whether to compute in bfloat16.
        offload: whether ZeRO keeps master weights, gradients and moments in CPU memory.
        reduce_each_micro_batch: whether FSDP2 reduces gradients after every micro-batch.
    """

    engine: EngineName
    processes: int = 1
    shard_size: int | None = None
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    accumulation: int = 1
    bf16: bool = False
    offload: bool = False
    reduce_each_micro_batch: bool = True


def held_bytes(module: LanguageModel, setup: Setup) -> Held:
    """Compute the memory of the process with the largest shard, from an unsharded model on ``meta``."""
    N = setup.processes
    every = list(module.parameters())
    trained = [parameter for parameter in every if parameter.requires_grad]
    remembered = remembered_parameters(module, setup.optimizer)
    P, T, M = (FLOAT * _size(each) for each in (every, trained, remembered))
    if setup.engine in ("local", "ddp", "zero0"):
        return Held(P, T, M)
    if setup.engine == "fsdp":
        S = setup.shard_size or N
        local = FLOAT * _cut(trained, S)
        whole = setup.accumulation > 1 and not setup.reduce_each_micro_batch
        return Held(FLOAT * _cut(every, S), T if whole else local, FLOAT * _cut(remembered, S))
    stage = zero_stage(setup.engine)
    part = -(-T // N)
    moments = M // T * part if T else 0  # M / T moments per parameter: ZeRO has elementwise optimizers only
    parameters = -(-P // N) if stage == 3 else P
    gathered = min(P, FLOAT * REUSED) if stage == 3 else 0
    host = 2 * part + moments if setup.offload else 0
    return Held(parameters + part, T if stage == 1 else part, moments, host, gathered)


def remembered_parameters(module: LanguageModel, optimizer: OptimizerSettings) -> list[nn.Parameter]:
    """Return the trained parameters of an unsharded model, each repeated once per moment of the optimizer."""
    parameters = dict(module.named_parameters())
    roles = parameter_roles(module, module.plan.block_modules(module), optimizer)
    return [parameters[name] for name, role in roles.items() for _ in moment_names(optimizer, role)]


def most_bytes(module: LanguageModel, setup: Setup, activations: Activations) -> int:
    """Compute the peak device memory during a step, in bytes, of the process with the largest shard.

    With engine ``local`` and one micro-batch, gradients are allocated while activations are freed, so their peaks do
    not coincide. FSDP2 holds the gathered parameters of two blocks and of those outside of the blocks. It holds the
    unsharded gradients of the largest group twice: as computed, and in the buffer of the reduce-scatter.

    Args:
        module: unsharded model on ``meta``.
        setup: engine and number of processes.
        activations: result of ``micro_batch_activations``.
    """
    held = held_bytes(module, setup)
    on_device = held.total - held.host
    if setup.engine == "local" and setup.accumulation == 1:
        return on_device - held.gradients + max(activations.peak, held.gradients + activations.one_block)
    block = max(_size(each.parameters()) for each in module.plan.block_modules(module))
    every, trained = _size(module.parameters()), _size(p for p in module.parameters() if p.requires_grad)
    beside = 0
    if setup.engine == "fsdp" and (setup.shard_size or setup.processes) > 1:
        rest = every - sum(_size(each.parameters()) for each in module.plan.block_modules(module))
        beside = (BF16 if setup.bf16 else FLOAT) * (rest + 2 * block) + 2 * FLOAT * max(block, rest)
    elif setup.engine.startswith("zero"):
        beside = held.gathered + FLOAT * min(trained, BUCKET)
    return on_device + activations.peak + beside


def sent_bytes(module: LanguageModel, setup: Setup) -> float:
    """Compute the bytes that one process sends in an optimizer step, from an unsharded model on ``meta``."""
    N, A = setup.processes, setup.accumulation
    every = list(module.parameters())
    trained = [parameter for parameter in every if parameter.requires_grad]
    P, T = FLOAT * _size(every), FLOAT * _size(trained)
    ring = (N - 1) / N
    if N == 1 or setup.engine == "local":
        return 0.0
    if setup.engine in ("ddp", "zero0"):
        return 2 * ring * T
    if setup.engine == "fsdp":
        S = setup.shard_size or N
        shards, replicas = (S - 1) / S, (N // S - 1) / (N // S)
        blocks = S * _cut((p for block in module.plan.block_modules(module) for p in block.parameters()), S)
        gathered = (2 if setup.bf16 else FLOAT) * (S * _cut(every, S) + blocks)
        reduced = FLOAT * S * _cut(trained, S)
        times = A if setup.reduce_each_micro_batch else 1
        reduce = times * shards * reduced + 2 * replicas * reduced / S
        return A * shards * gathered + reduce + _orthogonalising_bytes(module, setup, S)
    if setup.engine == "zero3":
        persistent = FLOAT * _size([parameter for parameter in every if parameter.numel() < PERSISTENT])
        times = 1 if P < FLOAT * REUSED else 2
        return ring * (persistent + A * times * (P - persistent) + A * T)
    return ring * T * (3 if setup.engine == "zero1" else 2 * A + 1)


def _orthogonalising_bytes(module: LanguageModel, setup: Setup, S: int) -> float:
    parameters = dict(module.named_parameters())
    roles = parameter_roles(module, module.plan.block_modules(module), setup.optimizer)
    pairs = [parameters[name].shape[1] for name, role in roles.items() if role == "factor" and name.endswith(".U")]
    dense = _size(parameters[name] for name, role in roles.items() if role == "dense")
    grams = sum(16 * R * (R + 1) for R in pairs)
    return 2 * (S - 1) / S * grams + 2 * (BF16 if setup.bf16 else FLOAT) * dense * (S - 1) / S**2


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _cut(parameters: Iterable[nn.Parameter], shards: int) -> int:
    """Return the number of elements in the largest shard, with each parameter divided by rows."""
    return sum(chunk(p.shape[0], 0, shards)[1] * (p.numel() // p.shape[0]) for p in parameters)
