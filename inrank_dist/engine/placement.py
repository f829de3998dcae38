"""Division of the rows of a tensor among processes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ..runtime.errors import UserError


@dataclass(frozen=True)
class RowPlacement:
    """Division of the rows (dimension 0) of a tensor among processes.

    Rows are divided into ``shards`` shards as by ``torch.chunk``. Each shard is held by ``replicas`` processes. For
    sums over all processes, its rows are divided again among the replicas, so that each row is counted once.

    Attributes:
        shard: index of this process's shard.
        shards: number of shards.
        replica: index of this process among the replicas of its shard.
        replicas: number of replicas of each shard.
        mesh: device mesh of the DTensor. None if the process holds a plain tensor.
        placements: placements of the DTensor.
        group: process group of the shards of one replica. None if there is one shard.
    """

    shard: int = 0
    shards: int = 1
    replica: int = 0
    replicas: int = 1
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()
    group: dist.ProcessGroup | None = None

    def rows(self, size: int) -> tuple[int, int]:
        """Return the range ``(first, end)`` of this process's rows of a tensor with ``size`` rows."""
        return chunk(size, self.shard, self.shards)

    def counted_rows(self, size: int) -> tuple[int, int]:
        """Return the part of ``rows`` that this process counts. Each row is counted by exactly one process."""
        start, end = self.rows(size)
        first, last = chunk(end - start, self.replica, self.replicas)
        return start + first, start + last

    def counted(self, held: Tensor, size: int) -> Tensor:
        """Return the counted rows, given this process's rows of a tensor with ``size`` rows."""
        offset, (start, end) = self.rows(size)[0], self.counted_rows(size)
        return held[start - offset : end - offset]

    def split(self, size: int) -> list[int]:
        """Return the number of rows in each shard of a tensor with ``size`` rows."""
        parts = (chunk(size, index, self.shards) for index in range(self.shards))
        return [end - start for start, end in parts]

    def wrap(self, held: Tensor, shape: torch.Size) -> Tensor:
        """Return the tensor of unsharded ``shape`` that has ``held`` as this process's rows.

        It is a DTensor that shares memory with ``held``, or ``held`` itself for a plain tensor.
        """
        return held if self.mesh is None else as_dtensor(held, self.mesh, self.placements, shape)

    def sum_over_shards(self, tensor: Tensor) -> None:
        """All-reduce in place over the processes that hold the shards of one replica."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)


def placement_of(name: str, parameter: Tensor, rank: int, world_size: int) -> RowPlacement:
    """Return the placement of a parameter. A plain tensor is replicated on all processes.

    Args:
        name: name of the parameter, for errors.
        parameter: the parameter, on any device including ``meta``.
        rank: process rank.
        world_size: number of processes.

    Raises:
        UserError: if the parameter is sharded over another dimension than its rows, over several dimensions of the
            mesh, or over a subset of the processes.
    """
    if not isinstance(parameter, DTensor):
        return RowPlacement(replica=rank, replicas=world_size)
    mesh, placements = parameter.device_mesh, tuple(parameter.placements)
    sharded = [dim for dim, placement in enumerate(placements) if type(placement) is Shard and placement.dim == 0]
    replicated = [dim for dim, placement in enumerate(placements) if isinstance(placement, Replicate)]
    if len(sharded) > 1 or len(sharded) + len(replicated) < len(placements):
        raise UserError(
            f"parameter {name} is placed as {list(placements)}; write a sharding by rows, Shard(0), over one dimension "
            "of the mesh, with Replicate() over the others"
        )
    if mesh.size() != world_size:
        raise UserError(
            f"parameter {name} is sharded over {mesh.size()} of {world_size} processes; write a mesh of all of them"
        )
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this process is not in the mesh"
    replica, replicas = 0, 1
    for dim in replicated:
        replica, replicas = replica * mesh.size(dim) + coordinate[dim], replicas * mesh.size(dim)
    if not sharded:
        return RowPlacement(0, 1, replica, replicas, mesh, placements)
    (dim,) = sharded
    return RowPlacement(coordinate[dim], mesh.size(dim), replica, replicas, mesh, placements, mesh.get_group(dim))


def as_dtensor(rows: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size) -> DTensor:
    """Return a contiguous DTensor of this unsharded shape with ``rows`` as the local tensor, sharing its memory."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=stride)


def local_rows(tensor: Tensor) -> Tensor:
    """Return this process's rows of a parameter, gradient or moment, sharing its memory."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def chunk(size: int, index: int, count: int) -> tuple[int, int]:
    """Return the range ``(first, end)`` of chunk ``index`` when ``size`` rows are divided as by ``torch.chunk``.

    Unlike with ``torch.chunk``, there are always ``count`` chunks, of which the last may be empty.
    """
    rows = -(-size // count)
    return min(index * rows, size), min((index + 1) * rows, size)
