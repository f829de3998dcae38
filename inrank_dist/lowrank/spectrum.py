"""Spectra of every layer at once: local Grams, one all-reduce, small problems (METHOD section 2)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], None]
"""Sums a tensor in place over all processes that hold rows."""


@dataclass(frozen=True)
class Factors:
    """Rows of a layer's factors: ``U: (rows of out, R)``, ``V: (rows of in, R)``; either may be empty."""

    U: Tensor
    V: Tensor

    @property
    def modes(self) -> int:
        return self.U.shape[1]


@dataclass(frozen=True)
class Grams:
    """``U.T @ U`` and ``V.T @ V`` over all rows, each ``(R, R)`` float64, equal bit for bit on every process."""

    U: Tensor
    V: Tensor


def sum_over_processes(tensors: list[Tensor], all_reduce: AllReduce) -> list[Tensor]:
    """Sum float64 tensors over processes with one collective, whatever their number."""
    if not tensors:
        return []
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def gram_matrices(factors: Mapping[str, Factors], all_reduce: AllReduce) -> dict[str, Grams]:
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
        rows, columns = torch.triu_indices(layer.modes, layer.modes, device=layer.U.device)
        for factor in (layer.U, layer.V):
            wide = factor.detach().double()
            packed.append((wide.T @ wide)[rows, columns])
    summed = iter(sum_over_processes(packed, all_reduce))
    return {
        name: Grams(_unpack(next(summed), layer.modes), _unpack(next(summed), layer.modes))
        for name, layer in factors.items()
    }


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
    length = gram.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(length > 0, 1 / length, torch.zeros_like(length))
    values, vectors = torch.linalg.eigh(gram * inverse * inverse[:, None])
    floor = values[-1:].clamp_min(0) * gram.shape[0] * torch.finfo(gram.dtype).eps
    kept = values > floor
    values, vectors = values[kept].sqrt(), vectors[:, kept]
    return Root((vectors * values).T * length, vectors / values * inverse[:, None])


def singular_values(grams: Grams) -> Tensor:
    """Singular values of ``U @ V.T``: ``(R,)`` float64, descending, without ever forming the product.

    ``U = Qu @ Ru`` and ``V = Qv @ Rv`` with roots of the Grams, so the product has the singular values of ``Ru @
    Rv.T``.
    """
    core = gram_root(grams.U).root @ gram_root(grams.V).root.T
    sigma = grams.U.new_zeros(grams.U.shape[0])
    if core.numel():
        values = torch.linalg.svdvals(core)
        sigma[: len(values)] = values
    return sigma
