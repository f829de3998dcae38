"""Deep layers: products ``W = U C_k ... C_1 V^T`` of more than two factors, with square cores ``C_j: (R, R)``.

Their spectra and rank events are those of the pair ``U C_k ... C_1`` and ``V``. Cores are small, so a rank event uses
them whole: each process gathers them with one all-reduce. Gradients of a layer's factors are ``G V_k`` for ``U``,
``G^T U_0`` for ``V`` and ``U_j^T G V_{j-1}`` for ``C_j``, where ``G`` is the gradient of ``W``,
``U_j = U C_k ... C_{j+1}`` and ``V_j = V C_1^T ... C_j^T``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layer import core_names
from .spectrum import FactorRows, Factors, Grams

SMALLEST = 1e-6
"""Singular values below this fraction of the largest are taken for rounding errors of float32. Those of a product of
cores are not inverted, so the first moment of ``U`` loses these directions."""


@dataclass(frozen=True)
class Absorbed:
    """Rows of the factors of a deep layer as those of a pair, ``U C_k ... C_1`` (float64) and ``V``.

    The product is computed on access and never cached, because those of all layers could need more memory than the
    model.

    Attributes:
        rows: rows of ``U`` and ``V``, with whole cores.
    """

    rows: Factors

    @property
    def U(self) -> Tensor:
        return self.rows.U.detach().double() @ running_products(self.rows.cores)[-1]

    @property
    def V(self) -> Tensor:
        return self.rows.V

    @property
    def modes(self) -> int:
        return self.rows.modes


def absorbed(rows: Factors) -> FactorRows:
    """Return the rows of a pair of factors with the same product."""
    return Absorbed(rows) if rows.cores else rows


def cores_of(rows: FactorRows) -> tuple[Tensor, ...]:
    """Return the cores of the layer, float64 on the CPU; empty unless it is deep."""
    return tuple(core.detach().double().cpu() for core in rows.rows.cores) if isinstance(rows, Absorbed) else ()


def running_products(cores: Sequence[Tensor]) -> list[Tensor]:
    """Return the float64 products ``A_j = C_j ... C_1`` for ``j`` from 1 to ``k``, after the identity ``A_0``."""
    products = [torch.eye(len(cores[0]), dtype=torch.float64, device=cores[0].device)]
    for core in cores:
        products.append(core.detach().double() @ products[-1])
    return products


def product_gradients(rows: Factors, grams: Grams) -> dict[str, Tensor]:
    """Return the gradient of ``|W|_F^2 / 2`` for all factors of ``W = U C_k ... C_1 V^T``, by name.

    It is ``W V_k`` for ``U``, ``W^T U_0`` for ``V`` and ``U_j^T W V_{j-1}`` for ``C_j`` (see above). All of them follow
    from Grams, and ``W`` is not computed (arXiv 2209.13569, for two factors).

    Args:
        rows: rows of ``U`` and ``V``, and whole cores.
        grams: Grams of ``U`` and ``V`` over all rows.

    Returns:
        The gradients of the same rows of ``U`` and ``V``, in their dtype, and those of whole cores.
    """
    U, V = rows.U, rows.V
    if not rows.cores:
        return {"U": U @ grams.V.to(U.dtype), "V": V @ grams.U.to(V.dtype)}
    products = running_products(rows.cores)
    whole = products[-1]
    of_U, of_V = whole @ grams.V @ whole.T, whole.T @ grams.U @ whole
    of_cores: list[Tensor] = []
    after = torch.eye(len(whole), dtype=whole.dtype, device=whole.device)  # C_k ... C_{j+1}
    for core, before in zip(reversed(rows.cores), reversed(products[:-1]), strict=True):
        of_cores.insert(0, after.T @ grams.U @ whole @ grams.V @ before.T)
        after = after @ core.double()
    found = {"U": U @ of_U.to(U.dtype), "V": V @ of_V.to(V.dtype)}
    return found | dict(zip(core_names(len(of_cores) + 2), of_cores, strict=True))


@dataclass(frozen=True)
class CoreMaps:
    """What a rank event does to the cores of a layer, and to the gradients of all its factors. Float64 on the CPU.

    The gradients transform as ``g_{V'} = g_V @ left[0]``, ``g_{C_j'} = left[j].T @ g_{C_j} @ right[j - 1]`` and
    ``g_{U'} = g_U @ right[k]``.

    Attributes:
        values: the new cores without fresh modes, ``(K, K)`` each.
        left, right: ``k + 1`` maps of gradients, ``(R, K)`` each.
        across: ``k + 1`` matrices ``(R, K)``. The columns of ``V_j'`` that are not fresh are ``V @ across[j]``.
        lengths: ``(k, K)`` squared norms of the columns of ``V @ across[j]`` for ``j < k``. None before
            ``event.orthogonalise`` and without fresh modes.
    """

    values: tuple[Tensor, ...]
    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    across: tuple[Tensor, ...]
    lengths: Tensor | None = None


def keep_cores(cores: Sequence[Tensor]) -> CoreMaps:
    """Return the maps of an event that keeps all modes. Fresh modes extend the cores by an identity."""
    products = running_products(cores)
    identity = (products[0],) * len(products)
    return CoreMaps(tuple(cores), identity, identity, tuple(product.T for product in products))


def balance_cores(cores: Sequence[Tensor], N: Tensor, M: Tensor, sigma: Tensor) -> CoreMaps:
    """Return the maps to balanced factors, each of which carries the singular values to the power ``1 / depth``.

    The new factors are ``X S^(1/depth)``, diagonal cores ``S^(1/depth)`` and ``Y S^(1/depth)`` (Arora et al., arXiv
    1802.06509, for the balance of deep linear networks). ``left[k]`` and ``right[0]`` are also the maps of ``U`` and
    ``V`` themselves.

    Args:
        cores: the old cores, whole.
        N, M: ``(R, K)``, maps of ``U C_k ... C_1`` and ``V`` to the balanced pair ``X sqrt(S)`` and ``Y sqrt(S)``.
        sigma: ``(K,)``, the singular values ``S``.
    """
    depth, products = len(cores) + 2, running_products(cores)
    share = sigma.clamp_min(torch.finfo(sigma.dtype).tiny) ** (1 / depth)
    rescaled = share / share ** (depth / 2)
    left, right = N * rescaled, M * rescaled
    last = len(cores)
    return CoreMaps(
        tuple(torch.diag(share) for _ in cores),
        tuple(product @ left * share ** (last - j) for j, product in enumerate(products)),
        (right, *(torch.linalg.pinv(p.T, rtol=SMALLEST) @ right * share**j for j, p in enumerate(products) if j)),
        tuple(right * share**j for j in range(last + 1)),
    )


def map_core(maps: CoreMaps, index: int, fresh: int) -> Tensor:
    """Return the new core ``C_index``, counted from 1, whole and float64. Fresh modes are the identity in it."""
    return torch.block_diag(maps.values[index - 1], torch.eye(fresh, dtype=torch.float64))


def map_core_first_moment(maps: CoreMaps, index: int, fresh: int, moment: Tensor) -> Tensor:
    """Map the whole first moment of a core as its gradient is mapped; zero in fresh rows and columns."""
    left, right = maps.left[index].to(moment.device), maps.right[index - 1].to(moment.device)
    mapped = (left.T @ moment.double() @ right).to(moment.dtype)
    return torch.nn.functional.pad(mapped, (0, fresh, 0, fresh))


def map_core_second_moment(
    maps: CoreMaps, index: int, fresh: int, first: Tensor, second: Tensor, share: float
) -> Tensor:
    """Map the whole second moment of Adam of a core, as ``event.map_second_moment`` does with those of ``U`` and ``V``.

    Args:
        maps, index, fresh: as for ``map_core_first_moment``.
        first, second: the bias-corrected moments, ``(R, R)``.
        share: ratio of the initial second moment of fresh entries to the mean of the others.
    """
    left, right = maps.left[index].to(first.device), maps.right[index - 1].to(first.device)
    m, v = first.double(), second.double()
    mapped = (left.square().T @ (v - m.square()) @ right.square() + (left.T @ m @ right).square()).abs()
    if not fresh:
        return mapped
    kept = len(mapped)
    whole = mapped.new_empty(kept + fresh, kept + fresh)
    whole[:kept, :kept] = mapped
    if not kept:
        return whole.fill_(share * float(v.mean()))
    assert maps.lengths is not None
    lengths = maps.lengths[index - 1].to(mapped.device)
    scaled = mapped / lengths.clamp_min(torch.finfo(torch.float32).tiny)
    whole[:kept, kept:] = share * scaled.mean(dim=1, keepdim=True)
    whole[kept:, :kept] = share * mapped.mean(dim=0)
    whole[kept:, kept:] = share * scaled.mean()
    return whole
