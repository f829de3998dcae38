"""Rank events: changes of the number of modes, given by small matrices that apply to any rows of the factors.

The new factors are ``U' = [U @ N, 0]`` and ``V' = [V @ M, fresh]``. The fresh columns of ``V'`` are orthonormal and
orthogonal to the column space of ``V @ M``. Factors are never gathered. Processes exchange only Gram matrices, inner
products with random directions, and solutions of small problems.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cores import CoreMaps, balance_cores, keep_cores
from .division import Processes, solve_once, sum_over_processes
from .spectrum import FactorRows, Factors, Grams, Spectra, gram_root


@dataclass(frozen=True)
class RankEvent:
    """The rank event of one layer. All matrices are float64.

    Attributes:
        N, M: ``(R, K)``, the maps of the existing modes of ``U`` and ``V``. Without cores, ``M`` also maps the gradient
            of ``U`` and ``N`` that of ``V``.
        fresh: number of fresh modes ``F``. The new number of modes is ``K + F``.
        from_old, from_new: ``(R, F)`` and ``(F, F)``. The fresh columns of ``V`` are ``V @ from_old + Z @ from_new``,
            where ``Z: (in, F)`` holds the random directions. None before ``orthogonalise`` and if ``fresh`` is 0.
        lengths: ``(K,)`` squared norms of the columns of ``V @ M``, of a deep layer ``V @ cores.across[k]``. None in
            the same cases.
        cores: what the event does to the ``k`` cores of a deep layer. None for other layers.
    """

    N: Tensor
    M: Tensor
    fresh: int = 0
    from_old: Tensor | None = None
    from_new: Tensor | None = None
    lengths: Tensor | None = None
    cores: CoreMaps | None = None

    @property
    def modes(self) -> int:
        return self.N.shape[1] + self.fresh

    def gradient_map(self, factor: str) -> Tensor:
        """Return ``Q: (R, K)`` with which the gradient of ``U`` or of ``V`` transforms, ``g' = g @ Q``."""
        if self.cores is not None:
            return self.cores.right[-1] if factor == "U" else self.cores.left[0]
        return self.M if factor == "U" else self.N


def grow(modes: int, new_modes: int, cores: Sequence[Tensor] = ()) -> RankEvent:
    """Return the event that appends fresh modes. Existing modes and the product of the factors do not change.

    A fresh mode is zero in ``U``, the identity in all cores and a unit column of ``V``. Its column of ``U`` gets the
    gradient ``G @ v``, as in a layer without cores, so it starts as fast and not as a saddle point of higher order.

    Args:
        modes, new_modes: number of modes before and after.
        cores: the cores of a deep layer, whole and float64.
    """
    identity = torch.eye(modes, dtype=torch.float64)
    return RankEvent(identity, identity, fresh=new_modes - modes, cores=keep_cores(cores) if cores else None)


def freeze(grams: Grams, rank: int) -> RankEvent:
    """Return the event that truncates the product ``U @ V.T`` to ``rank``, with balanced factors.

    The new factors are ``X sqrt(S)`` and ``Y sqrt(S)``, where ``X S Y^T`` is the truncated SVD of the product. They are
    computed from roots of the Grams: with ``G_U = A^T A``, ``G_V = B^T B`` and the SVD ``A B^T = P S Q^T``, the maps
    are ``N = A^+ P_r S_r^{1/2}`` and ``M = B^+ Q_r S_r^{1/2}``, where ``A^+`` denotes a right inverse.

    If fewer than ``rank`` singular values exceed the rounding error, the missing modes are fresh. Balanced modes with
    singular value zero would be zero in both factors and would never receive a gradient.
    """
    A, B = gram_root(grams.U), gram_root(grams.V)
    core = A.root @ B.root.T
    if core.numel() == 0:
        empty = grams.U.new_zeros(grams.U.shape[0], 0)
        return RankEvent(empty, empty, fresh=rank)
    X, S, Yh = torch.linalg.svd(core, full_matrices=False)
    # The rounding error of core is relative to the magnitude of its terms, not to its norm. If modes cancel each other,
    # the product can be zero although the terms are large.
    terms = (grams.U.diagonal() * grams.V.diagonal()).sqrt().sum()
    alive = int((torch.finfo(S.dtype).eps * grams.U.shape[0] * terms < S).sum())
    kept = min(rank, alive)
    root = S[:kept].sqrt()
    N, M = A.inverse @ (X[:, :kept] * root), B.inverse @ (Yh[:kept].T * root)
    return RankEvent(N, M, fresh=rank - kept)


def freeze_all(
    spectra: Spectra,
    ranks: Mapping[str, int],
    processes: Processes,
    cores: Mapping[str, Sequence[Tensor]] | None = None,
) -> dict[str, RankEvent]:
    """Compute ``freeze`` for every layer on its owner and share the results.

    Communication: one all-reduce of ``8 * sum (1 + 2 * R * rank)`` bytes.

    Args:
        spectra: spectra of the products.
        ranks: layer -> rank after the freeze.
        processes: the processes that hold rows.
        cores: deep layer -> its cores, whole and float64. The factors of these layers become balanced as
            ``cores.balance_cores`` describes.
    """

    def solve(name: str) -> list[Tensor]:
        event = freeze(spectra.grams[name], ranks[name])
        pad = (0, event.fresh)  # only the owner knows how many modes survive, but all need the shapes
        kept = torch.tensor([event.N.shape[1]], dtype=torch.float64)
        return [kept, torch.nn.functional.pad(event.N, pad), torch.nn.functional.pad(event.M, pad)]

    shapes = {
        name: [(1,), (len(sigma), ranks[name]), (len(sigma), ranks[name])] for name, sigma in spectra.sigma.items()
    }
    events = {}
    for name, (count, N, M) in solve_once(shapes, solve, spectra.owner, processes).items():
        kept = int(count)
        events[name] = RankEvent(N[:, :kept], M[:, :kept], fresh=ranks[name] - kept)
        if cores and cores.get(name):
            maps = balance_cores(cores[name], N[:, :kept], M[:, :kept], spectra.sigma[name][:kept])
            events[name] = RankEvent(maps.left[-1], maps.right[0], events[name].fresh, cores=maps)
    return events


def orthogonalise(
    events: Mapping[str, RankEvent],
    factors: Mapping[str, FactorRows],
    spectra: Spectra,
    directions: Mapping[str, Tensor],
    processes: Processes,
) -> dict[str, RankEvent]:
    """Compute the fresh columns of ``V``: an orthonormal basis of the component of ``Z`` orthogonal to ``V @ M``.

    Communication: two all-reduces, of ``8 * sum (R * F + F * F)`` bytes for the inner products and of
    ``8 * sum (R * F + F * F + K)`` bytes for the solutions, summed over the layers with fresh modes.

    Args:
        events: layer -> event.
        factors: layer -> rows of the factors. Each row is passed by exactly one process.
        spectra: spectra of ``factors``.
        directions: layer -> rows of its ``Z: (in, F)``, the same rows as those of ``factors[layer].V``.
        processes: the processes that hold rows.

    Returns:
        All events; those without fresh modes are unchanged. The fresh columns are the left singular vectors of the
        orthogonal component of ``Z``, in descending order of its singular values.
    """
    layers = [name for name, event in events.items() if event.fresh]
    products = []
    for name in layers:
        Z = directions[name].double()
        products += [factors[name].V.detach().double().T @ Z, Z.T @ Z]
    summed = iter(sum_over_processes(products, processes.sum))
    overlaps = {name: (next(summed).cpu(), next(summed).cpu()) for name in layers}

    def solve(name: str) -> list[Tensor]:
        overlap, gram = overlaps[name]
        M = events[name].M
        # Project Z onto the orthogonal complement of V @ M, then orthonormalise the projection.
        basis = M @ gram_root(M.T @ spectra.grams[name].V @ M).inverse  # V @ basis: orthonormal basis of V @ M
        shadow = basis.T @ overlap
        values, vectors = torch.linalg.eigh(gram - shadow.T @ shadow)
        floor = torch.finfo(values.dtype).eps * float(gram.diagonal().max())  # rounding can make eigenvalues negative
        from_new = (vectors / values.clamp_min(floor).sqrt()).flip(1)
        of_V = spectra.grams[name].V
        lengths = torch.stack([(each * (of_V @ each)).sum(0) for each in _across(events[name])])
        return [-basis @ shadow @ from_new, from_new, lengths]

    shapes = {
        name: [tuple(overlap.shape), tuple(gram.shape), (len(_across(events[name])), events[name].M.shape[1])]
        for name, (overlap, gram) in overlaps.items()
    }
    completed = dict(events)
    for name, (from_old, from_new, lengths) in solve_once(shapes, solve, spectra.owner, processes).items():
        event = events[name]
        cores = None if event.cores is None else replace(event.cores, lengths=lengths[:-1])
        completed[name] = RankEvent(event.N, event.M, event.fresh, from_old, from_new, lengths[-1], cores)
    return completed


def _across(event: RankEvent) -> tuple[Tensor, ...]:
    return (event.M,) if event.cores is None else event.cores.across


def map_factors(event: RankEvent, U: Tensor, V: Tensor, Z: Tensor | None) -> Factors:
    """Apply an event to rows of the factors. Dtype and device do not change.

    Args:
        event: the event, completed by ``orthogonalise`` if it has fresh modes.
        U: ``(rows of out, R)``.
        V: ``(rows of in, R)``.
        Z: ``(rows of in, F)``, the same rows as ``V``. None if ``F`` is 0.
    """
    new_U = U.new_zeros(U.shape[0], event.modes)
    new_V = V.new_empty(V.shape[0], event.modes)
    kept = event.N.shape[1]
    new_U[:, :kept] = _times(U, event.N)
    new_V[:, :kept] = _times(V, event.M)
    if event.fresh:
        assert event.from_old is not None and event.from_new is not None and Z is not None
        new_V[:, kept:] = (V.double() @ event.from_old.to(V.device) + Z.double() @ event.from_new.to(V.device)).to(
            V.dtype
        )
    return Factors(new_U, new_V)


def map_first_moment(event: RankEvent, moment: Tensor, other: Tensor) -> Tensor:
    """Map a first moment: ``m' = [m @ other, 0]``.

    The gradients of the factors transform as ``g_{U'} = g_U @ M`` and ``g_{V'} = g_V @ N``. The moment of ``U``
    therefore transforms with ``M``, and that of ``V`` with ``N``; see ``RankEvent.gradient_map`` for deep layers.

    Args:
        event: the event.
        moment: ``(rows, R)``.
        other: map of the *other* factor, ``(R, K)``.
    """
    mapped = moment.new_zeros(moment.shape[0], event.modes)
    mapped[:, : other.shape[1]] = _times(moment, other)
    return mapped


def map_second_moment(
    event: RankEvent,
    first: Tensor,
    second: Tensor,
    factor: str,
    *,
    step: float,
    betas: tuple[float, float],
) -> Tensor:
    """Map the second moment of Adam.

    If gradients transform by ``Q``, the bias-corrected moments transform as ``m' = m Q`` and
    ``v' = |(v - m^2) (Q o Q) + (m Q)^2|`` (LDAdam, arXiv 2410.16103).

    In each row, fresh columns start at ``fresh_share`` times the mean of the mapped columns. For ``U``, each mapped
    column is first divided by the squared norm of its column of ``V`` (of a deep layer, ``V C_1^T ... C_k^T``): the
    gradient of a column of ``U`` is the gradient of the weight times that column, and fresh ones have norm 1. If no
    column is kept, the mean of the old columns is taken.

    Args:
        event: the event.
        first, second: ``(rows, R)``, the moments as the optimizer stores them (not bias-corrected).
        factor: ``U`` or ``V``, the factor of these moments. ``Q`` is the map of the other factor.
        step: number of completed optimizer steps, at least 1.
        betas: the decay rates of Adam's moments.
    """
    other = event.gradient_map(factor)
    kept = other.shape[1]
    mapped = second.new_zeros(second.shape[0], event.modes)
    if _is_identity(other):
        mapped[:, :kept] = second
    else:
        Q = other.to(first.device)
        correction = 1 - betas[1] ** step
        m = first.double() / (1 - betas[0] ** step)
        v = second.double() / correction
        exact = ((v - m.square()) @ Q.square() + (m @ Q).square()).abs()
        mapped[:, :kept] = (exact * correction).to(second.dtype)
    if event.fresh:
        like = (mapped[:, :kept] if kept else second).double()
        if kept and factor == "U":
            assert event.lengths is not None
            like = like / event.lengths.to(mapped.device).clamp_min(torch.finfo(torch.float32).tiny)
        mapped[:, kept:] = (fresh_share(betas) * like.mean(dim=1, keepdim=True)).to(mapped.dtype)
    return mapped


LONGEST_STEP = 1.1
"""Largest update of a fresh column under a constant gradient, in units of the learning rate."""


@functools.cache
def fresh_share(betas: tuple[float, float]) -> float:
    """Return the ratio ``c`` of the initial second moment of a fresh column to the mean of the other columns.

    The event does not reset the step count of Adam, so there is no bias correction for a fresh column. After ``k``
    steps with a constant gradient of the same magnitude as the others, its update is
    ``(1 - b1^k) / sqrt(c b2^k + 1 - b2^k)`` times the learning rate. ``c`` is the smallest value for which this never
    exceeds ``LONGEST_STEP``: 0 for betas (0.9, 0.95) and 0.81 for (0.9, 0.999).
    """
    b1, b2 = betas
    share = 0.0
    for k in range(1, math.ceil(20 / (1 - b1)) + 1):
        if b2**k < 1e-12:
            break
        share = max(share, (((1 - b1**k) / LONGEST_STEP) ** 2 - (1 - b2**k)) / b2**k)
    return share


def _is_identity(matrix: Tensor) -> bool:
    return matrix.shape[0] == matrix.shape[1] and bool((matrix == torch.eye(len(matrix)).to(matrix)).all())


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Compute ``rows @ matrix`` in float64 and return it in the dtype of ``rows``.

    If the matrix is the identity, as for growth, ``rows`` is returned unchanged.
    """
    if _is_identity(matrix):
        return rows
    return (rows.double() @ matrix.to(rows.device)).to(rows.dtype)
