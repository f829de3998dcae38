"""Spectra of every layer at once: local Grams, one all-reduce, small problems.

The squared singular values of ``U V^T`` are the eigenvalues of ``G_V^{1/2} G_U G_V^{1/2}`` with ``G_U = U^T U``
and ``G_V = V^T V``. A Gram is a sum over rows.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .division import AllReduce, Processes, assign_owners, solve_once, sum_over_processes

STRIPS = 4
"""Parts in which a Gram is multiplied; only its upper triangle is, 5/8 of the work with four."""

BUCKET_BYTES = 256 * 2**20
"""Most bytes of packed triangles that one all-reduce carries; the Grams of GPT-2 large fit into one."""


class FactorRows(Protocol):
    """Rows of two matrices whose product has a spectrum: ``U: (rows of out, R)``, ``V: (rows of in, R)``, ``R`` being
    ``modes``; either may be empty."""

    @property
    def U(self) -> Tensor: ...
    @property
    def V(self) -> Tensor: ...
    @property
    def modes(self) -> int: ...


@dataclass(frozen=True)
class Factors:
    """Rows of a layer's factors, as they are held."""

    U: Tensor
    V: Tensor

    @property
    def modes(self) -> int:
        return self.U.shape[1]


@dataclass(frozen=True)
class DenseRows:
    """Rows of a dense weight as factors of it: ``U = W`` and ``V = I``, so that ``R`` is ``in``.

    The identity is made on access, never cached: of all layers at once it would outweigh the model. A Gram takes ``8
    in^2`` bytes, and its small problem the time of a singular value decomposition of that size.

    Attributes:
        U: ``(rows of out, in)``.
        first, end: the rows of ``V``.
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
    """Rows ``first`` to ``end`` of the identity ``(size, size)``, float32."""
    rows = torch.zeros(end - first, size, device=device)
    rows.diagonal(first).fill_(1.0)
    return rows


@dataclass(frozen=True)
class Learned:
    """Factors of ``U V^T - U0 V0^T``: what was learned, where the factors did not start at zero.

    With ``D_U = U - U0`` and ``D_V = V - V0`` in float64 that is ``[D_U, U0] [V, D_V]^T``; ``[U, U0] [V, -V0]^T`` is
    the same matrix, but a small update would drown in the rounding of its Grams. Columns that came by growth are zero
    in ``U0``: they need no partner in ``D_V``. Each matrix is computed on access, never cached: all layers at once
    would be four times the bytes of the factors.

    Attributes:
        now: the factors.
        start: the same rows of them at initialisation, on any device; as many columns as there were then.
    """

    now: Factors
    start: Factors

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
    """``U.T @ U`` and ``V.T @ V`` over all rows, each ``(R, R)`` float64, equal bit for bit on every process."""

    U: Tensor
    V: Tensor


def gram_matrices(factors: Mapping[str, FactorRows], all_reduce: AllReduce) -> dict[str, Grams]:
    """Grams of all layers with one all-reduce.

    Each process passes the rows that it alone counts (every row of a factor on exactly one process). The collective
    moves ``8 * sum_layers R * (R + 1)`` bytes (two packed float64 triangles a layer), independent of ``in`` and
    ``out``.

    Args:
        factors: this process's rows, same names in the same order everywhere.
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
    """Upper triangle of ``factor.T @ factor``, row by row; below the diagonal only some is computed (PyTorch has no
    ``syrk``)."""
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
    """A root of a Gram: ``G = root.T @ root`` with ``root: (k, R)``, and ``inverse: (R, k)`` with
    ``root @ inverse = I``; ``k`` is the numerical rank of ``G``."""

    root: Tensor
    inverse: Tensor


def gram_root(gram: Tensor) -> Root:
    """``La^{1/2} Q^T`` and ``Q La^{-1/2}`` of ``G = Q La Q^T``, directions below rounding dropped.

    The columns are first scaled to unit length (``G = D C D``): factors whose columns differ by many orders of
    magnitude keep their small directions, which an eigensolver of ``G`` itself would lose.
    """
    length, inverse = _column_lengths(gram)
    values, vectors = torch.linalg.eigh(gram * inverse * inverse[:, None])
    floor = values[-1:].clamp_min(0) * gram.shape[0] * torch.finfo(gram.dtype).eps
    kept = values > floor
    values, vectors = values[kept].sqrt(), vectors[:, kept]
    return Root((vectors * values).T * length, vectors / values * inverse[:, None])


def _any_root(gram: Tensor) -> Tensor:
    """``(k, R)`` with ``G = root.T @ root``, by whichever way is fastest.

    A Cholesky factor (a tenth of the time) where every column, scaled to unit length, is at least ``eps^{1/4}`` away
    from the span of those before it: nothing is near rounding then, and no direction has to be dropped.
    """
    length, inverse = _column_lengths(gram)
    factor, failed = torch.linalg.cholesky_ex(gram * inverse * inverse[:, None])
    if not failed and factor.diagonal().square().min() > torch.finfo(gram.dtype).eps ** 0.5:
        return factor.T * length
    return gram_root(gram).root


def _column_lengths(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths of the columns that the Gram is of, and their inverses; 0 for a column of zeros."""
    length = gram.diagonal().clamp_min(0).sqrt()
    return length, torch.where(length > 0, 1 / length, torch.zeros_like(length))


def singular_values(grams: Grams) -> Tensor:
    """Singular values of ``U @ V.T``: ``(R,)`` float64, descending, without ever forming the product.

    ``U = Qu @ Ru`` and ``V = Qv @ Rv`` with roots of the Grams, so the product has the singular values of ``Ru @
    Rv.T``.
    """
    core = _any_root(grams.U) @ _any_root(grams.V).T
    sigma = grams.U.new_zeros(grams.U.shape[0])
    if core.numel():
        values = torch.linalg.svdvals(core)
        sigma[: len(values)] = values
    return sigma


@dataclass(frozen=True)
class Spectra:
    """What one measurement found.

    Attributes:
        sigma: layer -> ``(R,)`` float64 singular values of ``U @ V.T``, descending; on CPU, equal bit for bit on every
            process.
        owner: layer -> the process that solved it and keeps its Grams.
        grams: the Grams of this process's own layers, on CPU.
        checksums: layer -> a checksum of the Grams that this process saw, to be compared over processes.
    """

    sigma: dict[str, Tensor]
    owner: dict[str, int]
    grams: dict[str, Grams]
    checksums: dict[str, int]


def measure_spectra(
    factors: Mapping[str, FactorRows], processes: Processes, *, bucket_bytes: int = BUCKET_BYTES
) -> Spectra:
    """Singular values of all layers: Grams by one all-reduce a bucket, every layer solved once, answers by one more.

    The collectives carry ``8 * sum R * (R + 1)`` bytes of Grams and ``8 * sum R`` of singular values. Beyond the Grams
    of its own layers a process needs at most four times a bucket (the triangles, their sum's view of them, and the
    unpacked matrices), which is ``bucket_bytes`` or the largest layer's triangles, four times the latter, and that
    layer's rows in float64.

    Args:
        factors: this process's rows, same names in the same order everywhere.

    Raises:
        FloatingPointError: a factor is not finite, or too large for float64 squares; in all processes alike.
    """
    owner = assign_owners({name: layer.modes for name, layer in factors.items()}, processes.count)
    own: dict[str, Grams] = {}
    checksums: dict[str, int] = {}
    for bucket in _buckets(factors, bucket_bytes):
        for name, grams in gram_matrices(bucket, processes.sum).items():
            if not (grams.U.isfinite().all() and grams.V.isfinite().all()):
                raise FloatingPointError(f"a factor of {name} is not finite")  # in every process: all hold the same
            checksums[name] = int(grams.U.view(torch.int64).sum() - grams.V.view(torch.int64).sum())
            if owner[name] == processes.rank:
                own[name] = Grams(grams.U.cpu(), grams.V.cpu())
    shapes = {name: [(layer.modes,)] for name, layer in factors.items()}
    answers = solve_once(shapes, lambda name: [singular_values(own[name])], owner, processes)
    return Spectra({name: sigma for name, (sigma,) in answers.items()}, owner, own, checksums)


def _buckets(factors: Mapping[str, FactorRows], most: int) -> Iterator[dict[str, FactorRows]]:
    """Consecutive layers whose packed triangles fit into ``most`` bytes; at least one layer each."""
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
