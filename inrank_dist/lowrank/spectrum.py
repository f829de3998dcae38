"""Singular values of the products of sharded factors.

The squared singular values of ``U V^T`` are the eigenvalues of ``G_V^{1/2} G_U G_V^{1/2}`` with the Gram matrices
``G_U = U^T U`` and ``G_V = V^T V`` (Grams for short). A Gram is a sum over rows, so each process computes the Gram of
its rows and an all-reduce adds them. What remains are small problems of size ``R``.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .division import AllReduce, Processes, assign_owners, solve_once, sum_over_processes

STRIPS = 4
"""Number of strips in which a Gram is computed. Blocks below the diagonal are skipped; with four strips, 5/8 of the
multiplications remain."""

BUCKET_BYTES = 256 * 2**20
"""Maximum size in bytes of the packed triangles in one all-reduce. The Grams of GPT-2 large fit into one bucket."""


class FactorRows(Protocol):
    """Rows of two matrices ``U: (rows of out, R)`` and ``V: (rows of in, R)`` with ``R = modes``. Either may have no
    rows."""

    @property
    def U(self) -> Tensor: ...
    @property
    def V(self) -> Tensor: ...
    @property
    def modes(self) -> int: ...


@dataclass(frozen=True)
class Factors:
    """Rows of the factors of a layer.

    Attributes:
        U, V: rows of ``U: (out, R)`` and ``V: (in, R)``.
        cores: the cores of a deep layer, whole, ``(R, R)`` each. Empty where they are not needed.
    """

    U: Tensor
    V: Tensor
    cores: tuple[Tensor, ...] = ()

    @property
    def modes(self) -> int:
        return self.U.shape[1]


@dataclass(frozen=True)
class DenseRows:
    """Rows of a dense weight as trivial factors ``U = W`` and ``V = I`` with ``R = in``.

    The rows of the identity are computed on access and never cached, because those of all layers could need more memory
    than the model. A Gram takes ``8 * in^2`` bytes; ``DenseColumns`` has smaller ones if ``in > out``.

    Attributes:
        U: ``(rows of out, in)``.
        first, end: range of the rows of ``V``.
    """

    U: Tensor
    first: int
    end: int

    @property
    def V(self) -> Tensor:
        return identity_rows(self.first, self.end, self.modes, self.U.device)

    @property
    def modes(self) -> int:
        return self.U.shape[1]


def identity_rows(first: int, end: int, size: int, device: torch.device) -> Tensor:
    """Return the rows ``first`` to ``end`` (exclusive) of the identity ``(size, size)``, float32."""
    rows = torch.zeros(end - first, size, device=device)
    rows.diagonal(first).fill_(1.0)
    return rows


@dataclass(frozen=True)
class Learned:
    """Factors of the update ``U V^T - U0 V0^T`` since initialisation.

    The factors are ``[D_U, U0]`` and ``[V, D_V]`` with ``D_U = U - U0`` and ``D_V = V - V0``, in float64. The factors
    ``[U, U0]`` and ``[V, -V0]`` have the same product, but a small update would be lost in the rounding error of their
    Grams. Columns appended by growth are zero in ``U0`` and need no column of ``D_V``.

    Each matrix is computed on access and never cached, because those of all layers would need four times the memory of
    float32 factors.

    Attributes:
        now: the current factors.
        start: the same rows at initialisation, with the number of columns at that time, on any device.
    """

    now: FactorRows
    start: FactorRows

    @property
    def U(self) -> Tensor:
        U, U0 = self.now.U.detach().double(), self._start(self.start.U)
        joined = torch.cat([U, U0], dim=1)
        joined[:, : U0.shape[1]] -= U0
        return joined

    @property
    def V(self) -> Tensor:
        V, V0 = self.now.V.detach().double(), self._start(self.start.V)
        return torch.cat([V, V[:, : V0.shape[1]] - V0], dim=1)

    @property
    def modes(self) -> int:
        return self.now.modes + self.start.modes

    def _start(self, rows: Tensor) -> Tensor:
        return rows.to(self.now.U.device, torch.float64)


@dataclass(frozen=True)
class Grams:
    """Gram matrices ``U.T @ U`` and ``V.T @ V`` over all rows, ``(R, R)`` float64, bitwise equal on all processes."""

    U: Tensor
    V: Tensor


def gram_matrices(factors: Mapping[str, FactorRows], all_reduce: AllReduce) -> dict[str, Grams]:
    """Compute the Grams of all layers with one all-reduce.

    Communication: ``8 * sum R * (R + 1)`` bytes, two packed float64 triangles per layer. It does not depend on ``in``
    and ``out``.

    Args:
        factors: layer -> rows of the factors. Each row is passed by exactly one process. All processes pass the same
            names in the same order.
        all_reduce: sums a float64 tensor in place over the processes.
    """
    packed = []
    for layer in factors.values():
        packed += [_packed_gram(layer.U), _packed_gram(layer.V)]
    summed = iter(sum_over_processes(packed, all_reduce))
    return {
        name: Grams(_unpack(next(summed), layer.modes), _unpack(next(summed), layer.modes))
        for name, layer in factors.items()
    }


def _packed_gram(factor: Tensor) -> Tensor:
    """Return the upper triangle of ``factor.T @ factor`` in row-major order.

    PyTorch has no ``syrk``. Strips avoid most of the work below the diagonal.
    """
    factor, size = factor.detach().double(), factor.shape[1]
    gram = factor.new_empty(size, size)
    edges = [size * strip // STRIPS for strip in range(STRIPS + 1)]
    for first, last in itertools.pairwise(edges):
        gram[first:last, first:] = factor[:, first:last].T @ factor[:, first:]
    rows, columns = torch.triu_indices(size, size, device=factor.device)
    return gram[rows, columns]


def _unpack(triangle: Tensor, size: int) -> Tensor:
    gram = triangle.new_empty(size, size)
    rows, columns = torch.triu_indices(size, size, device=triangle.device)
    gram[rows, columns] = triangle
    gram[columns, rows] = triangle
    return gram


@dataclass(frozen=True)
class Root:
    """A root of a Gram: ``root: (k, R)`` with ``G = root.T @ root``, and its right inverse ``inverse: (R, k)`` with
    ``root @ inverse = I``. ``k`` is the numerical rank of ``G``."""

    root: Tensor
    inverse: Tensor


def gram_root(gram: Tensor) -> Root:
    """Compute a root of a Gram from its eigendecomposition.

    The columns of the factor are scaled to unit norm first: ``G = D C D`` with a diagonal ``D``. With the
    eigendecomposition ``C = Q L Q^T``, the root is ``L^{1/2} Q^T D`` and its inverse ``D^{-1} Q L^{-1/2}``. Eigenvalues
    below the rounding error are dropped. The scaling preserves small directions of factors whose columns differ by
    many orders of magnitude; an eigendecomposition of ``G`` itself would lose them.
    """
    length, inverse = _column_lengths(gram)
    values, vectors = torch.linalg.eigh(gram * inverse * inverse[:, None])
    floor = values[-1:].clamp_min(0) * gram.shape[0] * torch.finfo(gram.dtype).eps
    kept = values > floor
    values, vectors = values[kept].sqrt(), vectors[:, kept]
    return Root((vectors * values).T * length, vectors / values * inverse[:, None])


def _any_root(gram: Tensor) -> Tensor:
    """Return a root ``(k, R)`` with ``G = root.T @ root``, computed by the fastest suitable method.

    The Cholesky factor is used if every column, scaled to unit norm, has a distance of more than ``eps^{1/4}`` to the
    span of the preceding columns. The Gram is then well-conditioned, and no direction has to be dropped. Otherwise the
    slower ``gram_root`` is used.
    """
    length, inverse = _column_lengths(gram)
    factor, failed = torch.linalg.cholesky_ex(gram * inverse * inverse[:, None])
    if not failed and factor.diagonal().square().min() > torch.finfo(gram.dtype).eps ** 0.5:
        return factor.T * length
    return gram_root(gram).root


def _column_lengths(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norms of the columns of the factor and their inverses, both 0 for a zero column."""
    length = gram.diagonal().clamp_min(0).sqrt()
    return length, torch.where(length > 0, 1 / length, torch.zeros_like(length))


def singular_values(grams: Grams) -> Tensor:
    """Compute the singular values of ``U @ V.T`` from the Grams of the factors.

    Roots ``Ru`` and ``Rv`` of the Grams satisfy ``U = Qu @ Ru`` and ``V = Qv @ Rv`` with orthonormal columns of ``Qu``
    and ``Qv``. The product therefore has the singular values of ``Ru @ Rv.T``.

    Returns:
        ``(R,)`` float64, descending.
    """
    core = _any_root(grams.U) @ _any_root(grams.V).T
    sigma = grams.U.new_zeros(grams.U.shape[0])
    if core.numel():
        values = torch.linalg.svdvals(core)
        sigma[: len(values)] = values
    return sigma


def dense_singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values of a float64 matrix from the Gram matrix of its shorter side.

    Returns:
        ``(min(out, in),)`` float64, descending, on the CPU. They are NaN if the matrix is not finite.
    """
    rows, columns = matrix.shape
    return singular_values_of_gram(matrix @ matrix.T if rows < columns else matrix.T @ matrix)


def gram_of_rows(rows: Tensor, all_reduce: AllReduce) -> Tensor:
    """Compute the Gram matrix ``W^T W: (in, in)`` float64 of a matrix of which each process passes some rows.

    Communication: one all-reduce of ``4 * in * (in + 1)`` bytes.
    """
    packed = _packed_gram(rows)
    all_reduce(packed)
    return _unpack(packed, rows.shape[1])


def singular_values_of_gram(gram: Tensor) -> Tensor:
    """Return the singular values of a matrix with this float64 Gram matrix, descending, on the CPU; NaN as above."""
    if not gram.isfinite().all():
        return torch.full((len(gram),), torch.nan, dtype=torch.float64)
    return torch.linalg.eigvalsh(gram.cpu()).clamp(min=0).sqrt().flip(0)


@dataclass(frozen=True)
class Spectra:
    """The spectra of all layers.

    Attributes:
        sigma: layer -> ``(R,)`` float64 singular values of ``U @ V.T``, descending, on the CPU, bitwise equal on all
            processes.
        owner: layer -> process rank of the process that computed its singular values and keeps its Grams.
        grams: Grams of the layers that this process owns, on the CPU.
        checksums: layer -> checksum of the Grams on this process. It must be equal on all processes.
    """

    sigma: dict[str, Tensor]
    owner: dict[str, int]
    grams: dict[str, Grams]
    checksums: dict[str, int]


def measure_spectra(
    factors: Mapping[str, FactorRows], processes: Processes, *, bucket_bytes: int = BUCKET_BYTES
) -> Spectra:
    """Compute the singular values of all layers. Each layer is solved by one process.

    Communication: one all-reduce per bucket for the Grams, ``8 * sum R * (R + 1)`` bytes in total, and one for the
    singular values, ``8 * sum R`` bytes.

    Peak extra memory of a process, beyond the Grams of the layers that it owns, is at most four buckets (packed
    triangles, their concatenation, and unpacked matrices), four times the packed triangles of the largest layer, and
    the rows of that layer in float64. A bucket takes ``bucket_bytes``, or more if the triangles of one layer do.

    Args:
        factors: layer -> rows of the factors. Each row is passed by exactly one process. All processes pass the same
            names in the same order.
        processes: the processes that hold rows.
        bucket_bytes: maximum size of a bucket in bytes.

    Raises:
        FloatingPointError: a factor is not finite or its squares overflow float64. All processes raise it.
    """
    owner = assign_owners({name: layer.modes for name, layer in factors.items()}, processes.count)
    own: dict[str, Grams] = {}
    checksums: dict[str, int] = {}
    for bucket in _buckets(factors, bucket_bytes):
        for name, grams in gram_matrices(bucket, processes.sum).items():
            if not (grams.U.isfinite().all() and grams.V.isfinite().all()):
                raise FloatingPointError(f"a factor of {name} is not finite")  # raised by all processes
            checksums[name] = int(grams.U.view(torch.int64).sum() - grams.V.view(torch.int64).sum())
            if owner[name] == processes.rank:
                own[name] = Grams(grams.U.cpu(), grams.V.cpu())
    shapes = {name: [(layer.modes,)] for name, layer in factors.items()}
    answers = solve_once(shapes, lambda name: [singular_values(own[name])], owner, processes)
    return Spectra({name: sigma for name, (sigma,) in answers.items()}, owner, own, checksums)


def _buckets(factors: Mapping[str, FactorRows], most: int) -> Iterator[dict[str, FactorRows]]:
    """Yield consecutive layers whose packed triangles fit into ``most`` bytes, at least one layer at a time."""
    bucket: dict[str, FactorRows] = {}
    size = 0
    for name, layer in factors.items():
        needed = 8 * layer.modes * (layer.modes + 1)
        if bucket and size + needed > most:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = layer
        size += needed
    if bucket:
        yield bucket
