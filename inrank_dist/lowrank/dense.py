"""Dense weights with ``in > out`` as trivial factors of ``out`` modes, so that no Gram matrix is larger than needed."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from .division import Processes, whole_matrix
from .event import RankEvent
from .spectrum import identity_rows


@dataclass(frozen=True)
class DenseColumns:
    """Columns of a dense weight as trivial factors ``U = I`` and ``V = W^T`` with ``R = out``.

    ``DenseRows`` has ``R = in``. The rows of the identity are computed on access and never cached.

    Attributes:
        V: ``(rows of in, out)``.
        first, end: range of the rows of ``U``.
    """

    V: Tensor
    first: int
    end: int

    @property
    def U(self) -> Tensor:
        return identity_rows(self.first, self.end, self.modes, self.V.device)

    @property
    def modes(self) -> int:
        return self.V.shape[1]


def dense_columns(
    rows: Tensor, out: tuple[int, int], in_: tuple[int, int], shape: tuple[int, int], processes: Processes
) -> DenseColumns:
    """Exchange rows of a dense weight for columns.

    Communication: one all-reduce of ``4 * out * in`` bytes if there are several processes. Peak extra memory: the whole
    layer, as in a forward pass of FSDP, and the columns of this process.

    Args:
        rows: the rows that this process counts, float32.
        out, in_: first and end (exclusive) of the rows, and of the columns, that this process counts.
        shape: ``(out, in)`` of the layer.
        processes: the processes that hold rows.
    """
    weight = whole_matrix(rows.detach(), out[0], shape, processes)
    return DenseColumns(weight[:, slice(*in_)].T.contiguous(), *out)


def as_rows(event: RankEvent, columns: DenseColumns, first: int, in_features: int, processes: Processes) -> RankEvent:
    """Convert the freeze of ``(I, W^T)`` to that of ``(W, I)``, in which the rows of a weight are mapped.

    The new ``V`` is ``W^T M`` in the first form, so it is the map ``M'`` of the second. In balanced factors the squared
    norms of its columns are the singular values, and the map of ``W`` to the new ``U`` is ``N' = M' S^{-1}``.

    Communication: one all-reduce of ``8 * in * (K + F)`` bytes.

    Args:
        event: balanced factors ``(I N, W^T M)``, with ``fresh`` modes orthogonalised.
        columns: columns of the weight. Each is passed by exactly one process.
        first: the first of them.
        in_features: number of columns of the weight.
        processes: the processes that hold columns.
    """
    maps = event.M if event.from_old is None else torch.cat([event.M, event.from_old], dim=1)
    V = columns.V.double()
    whole = V.new_zeros(in_features, maps.shape[1])
    whole[first : first + len(V)] = V @ maps.to(V.device)
    processes.sum(whole)
    M, from_old = whole.cpu().split([event.M.shape[1], maps.shape[1] - event.M.shape[1]], dim=1)
    N = M / M.square().sum(0)
    return dataclasses.replace(event, N=N, M=M, from_old=None if event.from_old is None else from_old)
