"""FSDP2: parameters, gradients and moments sharded by rows."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ..lowrank.convert import Layout
from ..models import LanguageModel
from ..optim import HeldRows, OptimizerSettings
from ..runtime.context import Context
from .engine import BuildOptions, Engine, Values, chunk


class FSDPEngine(Engine):
    """Rows of every parameter are divided among ``shard_size`` processes and replicated over the rest.

    FSDP2's default placement is ``Shard(0)``, so the rank dimension of the factors is never cut, and every rank event
    acts on local rows. Groups that are gathered together: each block, the head and the embedding where they are not
    tied, and the rest.

    Args:
        shard_size: processes that share one copy of the model; None: all.
        reduce_each_micro_batch: reduce-scatter gradients after every micro-batch, so that none is ever held whole.
    """

    name = "fsdp"

    def __init__(
        self,
        skeleton: LanguageModel,
        layout: Layout,
        values: Values | None,
        *,
        context: Context,
        optimizer: OptimizerSettings,
        options: BuildOptions,
        shard_size: int | None = None,
        reduce_each_micro_batch: bool = True,
    ) -> None:
        self.reduce_each_micro_batch = reduce_each_micro_batch
        self.shard_size = shard_size or context.world_size
        self.replicas = context.world_size // self.shard_size
        sizes: tuple[int, ...] = (self.replicas, self.shard_size)
        names: tuple[str, ...] = ("replicate", "shard")
        self.placements: tuple[Placement, ...] = (Replicate(), Shard(0))
        if self.replicas == 1:
            sizes, names, self.placements = sizes[1:], names[1:], self.placements[1:]
        self.mesh = init_device_mesh(context.device.type, sizes, mesh_dim_names=names)
        self.shard_group = self.mesh["shard"].get_group()
        self.replica_index, self.shard_index = divmod(context.rank, self.shard_size)
        super().__init__(skeleton, layout, values, context=context, optimizer=optimizer, options=options)

    def rows(self, size: int) -> tuple[int, int]:
        return chunk(size, self.shard_index, self.shard_size)

    def counted_rows(self, size: int) -> tuple[int, int]:
        start, end = self.rows(size)
        first, last = chunk(end - start, self.replica_index, self.replicas)
        return start + first, start + last

    def _shard(self, module: LanguageModel) -> None:
        policy = MixedPrecisionPolicy()
        if self.options.bf16:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in module.blocks:
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        if getattr(module.head, "weight", None) is not module.tok_embed.weight:
            fully_shard(module.tok_embed, mesh=self.mesh, mp_policy=policy)
            fully_shard(module.head, mesh=self.mesh, mp_policy=policy)
        fully_shard(module, mesh=self.mesh, mp_policy=policy)

    def _wrap(self, local: Tensor, shape: torch.Size) -> Tensor:
        start, end = self.rows(shape[0])
        assert local.shape[0] == end - start
        return as_dtensor(local, self.mesh, self.placements, shape)

    def _local(self, tensor: Tensor) -> Tensor:
        detached = tensor.detach()
        return detached.to_local() if isinstance(detached, DTensor) else detached

    def _held_rows(self) -> HeldRows:
        def split(size: int) -> list[int]:
            parts = (chunk(size, index, self.shard_size) for index in range(self.shard_size))
            return [end - start for start, end in parts]

        return HeldRows(self._local, self._sum_over_shards, split, self.shard_index, self.shard_group)

    def _sum_over_shards(self, tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor, group=self.shard_group)

    def _settle(self) -> None:
        # FSDP2 keeps the root group gathered after a forward pass; its parameters are then plain tensors that the
        # optimizer does not know.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _accumulating(self, last: bool) -> AbstractContextManager[object]:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last or self.reduce_each_micro_batch)
        # Replicas need the sum of all micro-batches only: what is reduced within a copy travels between copies once.
        self.module.set_requires_all_reduce(last)
        return super()._accumulating(last)


def as_dtensor(rows: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size) -> DTensor:
    """The whole contiguous tensor of which each process of ``mesh`` holds its rows; shares memory with them."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=stride)
