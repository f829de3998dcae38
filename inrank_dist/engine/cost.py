"""What an engine holds and sends, from the shapes alone: the formulas behind ``inrank plan``.

``P`` parameters, ``T`` of them trained; ``N`` processes, ``S`` of them share one copy (``N`` unless sharding is
hybrid); ``m`` moments (2 for AdamW, 1 for matrices with orthogonalised updates); ``A`` micro-batches in a step.
Weights, gradients and moments are float32, rows are cut as ``torch.chunk`` cuts them, and the largest part counts.
Bytes that one process holds between backward pass and step:

| engine       | parameters      | gradients                | moments   |
|--------------|-----------------|--------------------------|-----------|
| local, ddp   | 4 P             | 4 T                      | 4 m T     |
| zero0        | 4 P             | 4 T                      | 4 m T     |
| fsdp         | 4 P / S         | 4 T / S                  | 4 m T / S |
| zero1        | 4 P + 4 T / N   | 4 T                      | 4 m T / N |
| zero2        | 4 P + 4 T / N   | 4 T / N                  | 4 m T / N |
| zero3        | 4 P / N + 4 T/N | 4 T / N                  | 4 m T / N |

ZeRO-1 to -3 keep a master beside each trained weight. With ``parallel.reduce_each_micro_batch: false`` gradients of
fsdp are whole, 4 T, until the last of several micro-batches. DeepSpeed keeps up to 1e9 parameters of ZeRO-3 gathered
from the forward to the backward pass (``stage3_max_reuse_distance``), in a smaller model all of 4 P. Activations, what
is gathered for the block at work, and buckets of gradients on their way come on top.

Bytes that one process sends in a step, with an all-gather or reduce-scatter of ``x`` bytes sending ``x (N - 1) / N``
and an all-reduce twice that (rings: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
workstations"); ``P = B + R`` with ``B`` in the blocks; ``w`` bytes an element on its way, 4, or 2 with bf16 under fsdp:

| engine       | sent                                                                                          |
|--------------|-----------------------------------------------------------------------------------------------|
| ddp, zero0   | all-reduce 4 T                                                                                |
| fsdp         | A x all-gather w (2 B + R); A x reduce-scatter 4 T (once with                                 |
|              | ``reduce_each_micro_batch: false``); hybrid: all-reduce 4 T / S over the replicas             |
| zero1        | all-reduce 4 T; all-gather 4 T                                                                |
| zero2        | A x all-reduce 4 T; all-gather 4 T                                                            |
| zero3        | A x all-gather 4 P (twice above 1e9 parameters); A x reduce-scatter 4 T; parameters below 1e5 |
|              | elements are gathered once a step                                                             |

Those of ZeRO are what DeepSpeed does by default (``stage3_max_reuse_distance``,
``stage3_param_persistence_threshold``).

With orthogonalised updates and fsdp a step also sends, in each group of ``S`` processes, an all-reduce of
``16 R (R + 1)`` bytes for each pair of factors with ``R`` columns, and ``2 w n (S - 1) / S^2`` bytes for each dense
matrix of ``n`` elements (``optim.matrices``).
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
"""Elements of DeepSpeed's buckets of gradients, at most (``zero.MOST_IN_A_BUCKET``)."""
PERSISTENT, REUSED = 100_000, 1_000_000_000
"""DeepSpeed's defaults, in elements: parameters below stay gathered at ZeRO-3; models below are gathered once."""


@dataclass(frozen=True)
class Held:
    """Bytes that one process holds between backward pass and optimizer step.

    Attributes:
        parameters: with ZeRO's masters.
        host: how much of the total is in the memory of the CPU (``parallel.offload_optimizer``).
        gathered: what ZeRO-3 may keep gathered from the forward to the backward pass; not in the total.
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
    """Everything beside the shapes that the formulas need.

    Attributes:
        engine: its name.
        processes: ``N``.
        shard_size: ``S``, of fsdp; None: all.
        optimizer: which decides ``m``.
        accumulation: ``A``.
        bf16: computes in bfloat16.
        offload: ZeRO keeps masters, gradients and moments in the memory of the CPU.
        reduce_each_micro_batch: FSDP2 reduces gradients after every micro-batch.
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
    """What the process with the most rows holds of an unsharded model (on ``meta``)."""
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
    moments = M // T * part if T else 0  # the same for all: ZeRO trains element by element
    parameters = -(-P // N) if stage == 3 else P
    gathered = min(P, FLOAT * REUSED) if stage == 3 else 0
    host = 2 * part + moments if setup.offload else 0
    return Held(parameters + part, T if stage == 1 else part, moments, host, gathered)


def remembered_parameters(module: LanguageModel, optimizer: OptimizerSettings) -> list[nn.Parameter]:
    """Each trained parameter of an unsharded model as often as the optimizer has moments of it."""
    parameters = dict(module.named_parameters())
    roles = parameter_roles(module, module.plan.block_modules(module), optimizer)
    return [parameters[name] for name, role in roles.items() for _ in moment_names(optimizer, role)]


def most_bytes(module: LanguageModel, setup: Setup, activations: Activations) -> int:
    """The most that the process with the most rows holds on its device in a step of an unsharded model (on ``meta``).

    Where gradients are whole and made anew in a single micro-batch, they grow as activations go, so that the two are
    not at their most at once. FSDP2 has the rest of the model and two blocks gathered, and the gradients of one block
    twice, whole and on their way.
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
    """What one process sends in an optimizer step of an unsharded model (on ``meta``)."""
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
    """Elements of the largest part, by rows."""
    return sum(chunk(p.shape[0], 0, shards)[1] * (p.numel() // p.shape[0]) for p in parameters)
