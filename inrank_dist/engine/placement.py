"""Which rows of a tensor a process holds, read off a parameter."""

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
    """How the rows (the first dimension) of a tensor are divided among processes.

    Rows are cut into ``shards`` parts as ``torch.chunk`` cuts them. Each part is held by ``replicas`` processes, among
    which it is cut again where every row must be counted exactly once.

    Attributes:
        shard, shards: index of this process's part, and how many there are.
        replica, replicas: index of this process among those that hold the same part, and how many they are.
        mesh, placements: of the DTensor; None where the process holds a plain tensor.
        group: the processes that hold the different parts of one copy; None where there is one part.
    """

    shard: int = 0
    shards: int = 1
    replica: int = 0
    replicas: int = 1
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()
    group: dist.ProcessGroup | None = None

    def rows(self, size: int) -> tuple[int, int]:
        """First row and end of the rows that this process holds of ``size``."""
        return chunk(size, self.shard, self.shards)

    def counted_rows(self, size: int) -> tuple[int, int]:
        """The part of ``rows`` that this process alone counts: over all processes every row exactly once."""
        start, end = self.rows(size)
        first, last = chunk(end - start, self.replica, self.replicas)
        return start + first, start + last

    def counted(self, held: Tensor, size: int) -> Tensor:
        """Of the rows that this process holds of ``size``, those that it alone counts."""
        offset, (start, end) = self.rows(size)[0], self.counted_rows(size)
        return held[start - offset : end - offset]

    def split(self, size: int) -> list[int]:
        """How many of ``size`` rows each part has."""
        parts = (chunk(size, index, self.shards) for index in range(self.shards))
        return [end - start for start, end in parts]

    def wrap(self, held: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of this shape of which ``held`` are this process's rows; shares memory with them."""
        return held if self.mesh is None else as_dtensor(held, self.mesh, self.placements, shape)

    def sum_over_shards(self, tensor: Tensor) -> None:
        """Sum in place over the processes that hold different rows of one copy."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)


def placement_of(name: str, parameter: Tensor, rank: int, world_size: int) -> RowPlacement:
    """The placement of a parameter, on ``meta`` or not. A plain tensor is held whole by every process.

    Raises:
        UserError: it is divided otherwise than by rows.
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
    """The whole contiguous tensor of which each process of ``mesh`` holds its rows; shares memory with them."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=stride)


def local_rows(tensor: Tensor) -> Tensor:
    """This process's rows of a parameter, gradient or moment; shares memory with it."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def chunk(size: int, index: int, count: int) -> tuple[int, int]:
    """Rows of part ``index`` when ``size`` rows are cut as ``torch.chunk`` cuts them; trailing parts may be empty."""
    rows = -(-size // count)
    return min(index * rows, size), min((index + 1) * rows, size)
