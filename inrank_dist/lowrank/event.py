"""A rank event: a pair of small maps, applied to whatever rows a process holds.

``U' = [U @ N, 0]`` and ``V' = [V @ M, fresh]``, where the fresh columns of ``V'`` are orthonormal and orthogonal to ``V
@ M``. No factor is ever gathered: beyond the Grams, only overlaps with the fresh directions travel.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .division import Processes, solve_once, sum_over_processes
from .spectrum import FactorRows, Factors, Grams, Spectra, gram_root


@dataclass(frozen=True)
class RankEvent:
    """One layer's change of shape. All matrices float64.

    Attributes:
        N, M: ``(R, K)``, what becomes of the existing modes.
        fresh: number of new modes ``F``; the new number of modes is ``K + F``.
        from_old, from_new: ``(R, F)`` and ``(F, F)``: the fresh columns of ``V`` are ``V @ from_old + Z @ from_new``
            with ``Z`` the ``(in, F)`` random directions. None until ``orthogonalise``, and where ``fresh`` is 0.
        lengths: ``(K,)`` squared lengths of the columns of ``V @ M``; None likewise.
    """

    N: Tensor
    M: Tensor
    fresh: int = 0
    from_old: Tensor | None = None
    from_new: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def modes(self) -> int:
        return self.N.shape[1] + self.fresh


def grow(modes: int, new_modes: int) -> RankEvent:
    """Append modes; the existing ones and the function stay exactly as they are."""
    identity = torch.eye(modes, dtype=torch.float64)
    return RankEvent(identity, identity, fresh=new_modes - modes)


def freeze(grams: Grams, rank: int) -> RankEvent:
    """Best rank-``rank`` approximation of the product as balanced factors ``U sqrt(S)``, ``V sqrt(S)``.

    With roots ``G_U = A^T A``, ``G_V = B^T B`` and ``A B^T = X S Y^T``: ``N = A^+ X_r S_r^{1/2}``, ``M = B^+ Y_r
    S_r^{1/2}``. Where the product has fewer than ``rank`` singular values above rounding, the missing modes are fresh
    ones: balanced modes of value zero would have both columns zero and never receive a gradient.
    """
    A, B = gram_root(grams.U), gram_root(grams.V)
    core = A.root @ B.root.T
    if core.numel() == 0:
        empty = grams.U.new_zeros(grams.U.shape[0], 0)
        return RankEvent(empty, empty, fresh=rank)
    X, S, Yh = torch.linalg.svd(core, full_matrices=False)
    # What rounds in ``core`` is the sum of its terms, not its norm: where the columns of U and V cancel, a zero product
    # would otherwise pass for one of tiny modes.
    terms = (grams.U.diagonal() * grams.V.diagonal()).sqrt().sum()
    alive = int((torch.finfo(S.dtype).eps * grams.U.shape[0] * terms < S).sum())
    kept = min(rank, alive)
    root = S[:kept].sqrt()
    N, M = A.inverse @ (X[:, :kept] * root), B.inverse @ (Yh[:kept].T * root)
    return RankEvent(N, M, fresh=rank - kept)


def freeze_all(spectra: Spectra, ranks: Mapping[str, int], processes: Processes) -> dict[str, RankEvent]:
    """``freeze`` of every layer, each solved by its owner; one collective of ``8 * sum (1 + 2 * R * rank)`` bytes."""

    def solve(name: str) -> list[Tensor]:
        event = freeze(spectra.grams[name], ranks[name])
        pad = (0, event.fresh)  # the number of surviving modes is the owner's finding; shapes must be known to all
        kept = torch.tensor([event.N.shape[1]], dtype=torch.float64)
        return [kept, torch.nn.functional.pad(event.N, pad), torch.nn.functional.pad(event.M, pad)]

    shapes = {
        name: [(1,), (len(sigma), ranks[name]), (len(sigma), ranks[name])] for name, sigma in spectra.sigma.items()
    }
    events = {}
    for name, (count, N, M) in solve_once(shapes, solve, spectra.owner, processes).items():
        kept = int(count)
        events[name] = RankEvent(N[:, :kept], M[:, :kept], fresh=ranks[name] - kept)
    return events


def orthogonalise(
    events: Mapping[str, RankEvent],
    factors: Mapping[str, FactorRows],
    spectra: Spectra,
    directions: Mapping[str, Tensor],
    processes: Processes,
) -> dict[str, RankEvent]:
    """Complete events that have fresh modes: columns that span what ``directions`` add to ``V @ M``.

    One all-reduce of the overlaps, ``8 * sum (R * F + F * F)`` bytes over the layers that have fresh modes, and one of
    the owners' answers, ``8 * sum (R * F + F * F + K)``.

    Args:
        factors: rows that this process alone counts.
        spectra: of ``factors``.
        directions: layer -> rows of its ``Z: (in, F)``, the same rows as those of ``factors[layer].V``.

    Returns:
        All events; those without fresh modes unchanged. The fresh columns are ordered by how much of ``Z`` lies along
        them.
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
        # Project Z on the orthogonal complement of V @ M, then make what is left orthonormal.
        basis = M @ gram_root(M.T @ spectra.grams[name].V @ M).inverse  # V @ basis: orthonormal columns that span V @ M
        shadow = basis.T @ overlap
        values, vectors = torch.linalg.eigh(gram - shadow.T @ shadow)
        floor = torch.finfo(values.dtype).eps * float(gram.diagonal().max())  # rounding may leave less than nothing
        from_new = (vectors / values.clamp_min(floor).sqrt()).flip(1)
        return [-basis @ shadow @ from_new, from_new, (M * (spectra.grams[name].V @ M)).sum(0)]

    shapes = {
        name: [tuple(overlap.shape), tuple(gram.shape), (events[name].M.shape[1],)]
        for name, (overlap, gram) in overlaps.items()
    }
    completed = dict(events)
    for name, (from_old, from_new, lengths) in solve_once(shapes, solve, spectra.owner, processes).items():
        event = events[name]
        completed[name] = RankEvent(event.N, event.M, event.fresh, from_old, from_new, lengths)
    return completed


def map_factors(event: RankEvent, U: Tensor, V: Tensor, Z: Tensor | None) -> Factors:
    """Apply an event to rows of the factors; keeps their dtype and device.

    Args:
        U: ``(rows of out, R)``; V: ``(rows of in, R)``; Z: ``(rows of in, F)``, the same rows as V, or None if ``F`` is
            0.
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
    """``m' = [m @ other, 0]``: gradients transform as ``g_{U'} = g_U @ M``, so U's moments move with ``M`` and V's with
    ``N``.

    Args:
        moment: ``(rows, R)``; other: the *other* factor's map, ``(R, K)``.
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
    """Second moment of Adam under ``m -> m Q``: ``v' = |(v - m^2) (Q o Q) + (m Q)^2|`` on bias-corrected moments
    (LDAdam, arXiv 2410.16103).

    Fresh columns start from ``fresh_share`` of each row's mean over the mapped ones, in ``U`` for each unit of the
    partner's squared length: the gradient of a column of ``U`` is ``G`` times its column of ``V``, of length one where
    it is fresh. The README has the losses that this leads to.

    Args:
        first, second: ``(rows, R)``, as the optimizer keeps them (not bias-corrected).
        factor: whose moments these are, ``U`` or ``V``; they move with the map of the other.
        step: optimizer steps so far, at least 1.
    """
    other = event.M if factor == "U" else event.N
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
        like = (mapped[:, :kept] if kept else second).double()  # else the old columns are all there is to go by
        if kept and factor == "U":
            assert event.lengths is not None
            like = like / event.lengths.to(mapped.device).clamp_min(torch.finfo(torch.float32).tiny)
        mapped[:, kept:] = (fresh_share(betas) * like.mean(dim=1, keepdim=True)).to(mapped.dtype)
    return mapped


LONGEST_STEP = 1.1
"""Learning rates that a step of a fresh column may be long while its gradient stands still."""


@functools.cache
def fresh_share(betas: tuple[float, float]) -> float:
    """Share ``c`` of the others' mean with which the second moment of a fresh column starts.

    The optimizer's ``step`` is kept, so Adam does not correct the bias of a column that starts from zero: after ``k``
    steps with a gradient of the others' size it moves ``(1 - b1^k) / sqrt(c b2^k + 1 - b2^k)`` learning rates. ``c`` is
    the least for which that never exceeds ``LONGEST_STEP``: 0 for (0.9, 0.95), whose longest step is 1.1 anyway; 0.81
    for (0.9, 0.999), where it would be 6.5.
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
    """``rows @ matrix`` in float64, returned in the dtype of ``rows``; growth's identity costs nothing and changes no
    bit."""
    if _is_identity(matrix):
        return rows
    return (rows.double() @ matrix.to(rows.device)).to(rows.dtype)
