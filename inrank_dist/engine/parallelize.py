"""How a model on ``meta`` is made to run: activation checkpointing, then compilation, then sharding."""

from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from ..models.plan import ModelPlan


def checkpoint_blocks(model: nn.Module, plan: ModelPlan) -> None:
    """Recompute each block in the backward pass."""
    for block in plan.block_modules(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(model: nn.Module, plan: ModelPlan, *, dynamic: bool, cuda_graphs: bool) -> None:
    """Compile the blocks and the modules in ``plan.compiled`` when they are first called.

    While ranks grow they are symbols: the second rank that a graph meets makes it one for all (four blocks with 24
    ranks and three growths took three compilations). After that each block has the shapes that it keeps. On two CPU
    cores compiling takes a tenth off the peak memory of GPT-2 small, and nothing off the time (README).

    Args:
        dynamic: ranks still change.
        cuda_graphs: replay the blocks as CUDA graphs.
    """
    from torch import _dynamo  # slow to import, and of use here alone

    # Blocks share their code, so each layout of a block, in train and in eval mode, is one more compilation of the
    # same function; beyond torch's limits it would silently go on without compiling.
    limit = 4 * len(plan.blocks) + 16
    _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, limit)
    _dynamo.config.accumulated_recompile_limit = max(_dynamo.config.accumulated_recompile_limit, limit)
    # Parameters are taken for static unless told otherwise; without growth `dynamic=False` says that they are.
    _dynamo.config.force_parameter_static_shapes = False
    _dynamo.config.force_nn_module_property_static_shapes = False
    shapes = None if dynamic else False
    for block in plan.block_modules(model):
        block.compile(dynamic=shapes, mode="reduce-overhead" if cuda_graphs else None)
    for name in plan.compiled:
        model.get_submodule(name).compile(dynamic=shapes)


def shard_blocks(model: nn.Module, plan: ModelPlan, mesh: DeviceMesh, *, bf16: bool) -> None:
    """Shard with FSDP2 over the last dimension of the mesh: each block, each of ``plan.units``, and the rest.

    FSDP2's default placement is ``Shard(0)``, so the rank dimension of the factors is never cut.

    Args:
        bf16: gather parameters in bfloat16; gradients are reduced in float32.
    """
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name in (*plan.blocks, *plan.units):
        fully_shard(model.get_submodule(name), mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def shard_mesh(device_type: str, world_size: int, shard_size: int | None) -> DeviceMesh:
    """``(shard,)``, or ``(replicate, shard)`` where ``shard_size`` processes share one copy of the model."""
    if shard_size is None or shard_size == world_size:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    sizes = (world_size // shard_size, shard_size)
    return init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "shard"))
