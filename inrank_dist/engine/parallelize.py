"""Activation checkpointing, compilation and sharding of a model on ``meta``, to be applied in this order."""

import warnings
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from ..models.plan import ModelPlan


def checkpoint_blocks(model: nn.Module, plan: ModelPlan) -> None:
    """Apply activation checkpointing to each block."""
    for block in plan.block_modules(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(model: nn.Module, plan: ModelPlan, *, dynamic: bool, cuda_graphs: bool) -> None:
    """Compile the blocks and the modules in ``plan.compiled`` at their first call.

    With ``dynamic``, the second rank that a graph encounters makes the rank a symbolic size, and one graph then serves
    all ranks. Otherwise each block is compiled for static shapes.

    Args:
        model: the model, modified in place.
        plan: names of its blocks.
        dynamic: whether ranks can still change.
        cuda_graphs: replay the blocks as CUDA graphs.
    """
    from torch import _dynamo  # slow to import

    # Blocks share their code, so each layout of a block, in train and in eval mode, recompiles the same function.
    # Beyond its default limits, torch silently falls back to eager mode.
    limit = 4 * len(plan.blocks) + 16
    _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, limit)
    _dynamo.config.accumulated_recompile_limit = max(_dynamo.config.accumulated_recompile_limit, limit)
    # By default the shapes of parameters are static even if dynamic shapes are allowed.
    _dynamo.config.force_parameter_static_shapes = False
    _dynamo.config.force_nn_module_property_static_shapes = False
    shapes = None if dynamic else False
    for block in plan.block_modules(model):
        block.compile(dynamic=shapes, mode="reduce-overhead" if cuda_graphs else None)
    for name in plan.compiled:
        model.get_submodule(name).compile(dynamic=shapes)


def shard_blocks(model: nn.Module, plan: ModelPlan, mesh: DeviceMesh, *, bf16: bool) -> None:
    """Shard each block, each of ``plan.units``, and the remaining parameters with FSDP2.

    FSDP2 shards dimension 0 by default, so the rank dimension of the factors is never sharded.

    Args:
        model: model on ``meta``, modified in place.
        plan: names of its blocks and units.
        mesh: parameters are sharded over its last dimension, see ``shard_mesh``.
        bf16: all-gather parameters in bfloat16. Gradients are reduced in float32.
    """
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # Blocks of models.layers return views with layer crossing. Nothing changes them in place.
    warnings.filterwarnings(
        "ignore", message=r"FSDP2-wrapped module \(FSDPBlock\) returned a view", category=UserWarning
    )
    for name in (*plan.blocks, *plan.units):
        fully_shard(model.get_submodule(name), mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def shard_mesh(device_type: str, world_size: int, shard_size: int | None) -> DeviceMesh:
    """Return the device mesh ``(shard,)``, or ``(replicate, shard)`` for hybrid sharding.

    Args:
        device_type: such as ``cuda``.
        world_size: number of processes.
        shard_size: number of processes that share one replica of the model. None: all.
    """
    if shard_size is None or shard_size == world_size:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    sizes = (world_size // shard_size, shard_size)
    return init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "shard"))
