"""Initialisation of factors and bases.

Random values depend only on the seed and on names, not on the number of processes or the order of calls.
"""

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor

from .spectrum import Factors

Init = Literal["orthogonal", "kaiming", "spectral", "spectral_ones", "loaded"]


def seed_for(seed: int, *names: object) -> int:
    """Derive a 56-bit seed from a seed and names."""
    digest = hashlib.sha256("\0".join([str(seed), *map(str, names)]).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def generator_for(seed: int, *names: object) -> torch.Generator:
    """Return a new CPU generator seeded with ``seed_for``."""
    return torch.Generator().manual_seed(seed_for(seed, *names))


def orthonormal_columns(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return a uniformly distributed ``(rows, columns)`` float32 matrix with orthonormal columns.

    ``columns`` must not exceed ``rows``.
    """
    q, r = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    # A positive diagonal of R makes the distribution uniform and the result independent of the signs that QR chooses.
    return (q * r.diagonal().sign()).float()


def start_base(out_features: int, in_features: int, init: Init, std: float, generator: torch.Generator) -> Tensor:
    """Return an initialised dense base ``W0: (out, in)``, float32.

    - ``orthogonal``: orthonormal rows or columns times ``std * sqrt(max(out, in))``. This is the root mean square of
      the singular values of a Gaussian matrix with standard deviation ``std``, so the base has the scale of the dense
      weight.
    - ``kaiming``: uniform in ``[-1/sqrt(in), 1/sqrt(in)]``, the default of PyTorch (``a = sqrt(5)``).

    Args:
        init: ``orthogonal`` or ``kaiming``.
        std: standard deviation of the dense weight at initialisation; unused by ``kaiming``.

    Raises:
        ValueError: another ``init``.
    """
    if init == "kaiming":
        return _uniform(out_features, in_features, in_features, generator)
    if init != "orthogonal":
        raise ValueError(f"a base starts as orthogonal or kaiming, not as {init}")
    tall, wide = max(out_features, in_features), min(out_features, in_features)
    weight = orthonormal_columns(tall, wide, generator) * (std * math.sqrt(tall))
    return weight if out_features >= in_features else weight.T.contiguous()


def start_factors(
    out_features: int,
    in_features: int,
    modes: int,
    init: Init | None,
    std: float,
    generator: torch.Generator,
    *,
    depth: int = 2,
    scale: float = 0.1,
    orthonormal_outer: bool = False,
) -> Factors:
    """Return initialised factors ``U: (out, R)`` and ``V: (in, R)``, and cores if ``depth`` is above 2, float32.

    If ``init`` is None, the layer has a base. At depth 2, ``U`` is zero and ``V`` has orthonormal columns, so the
    product starts at zero. In a deep layer, a zero factor would be a saddle point of higher order. All its factors are
    random orthogonal matrices times ``scale`` (Yaras et al., arXiv 2406.04112), so the ``R`` singular values of the
    product start at ``scale ** depth``. Otherwise the product is the whole weight of the layer:

    - ``kaiming`` (the published code of arXiv 2306.11250): both factors are uniform with ``a = sqrt(5)``. The fan-in is
      ``in`` for ``V`` and ``min(in, out) / 2``, the rank preallocated by that code, for ``U``.
    - ``spectral`` (arXiv 2209.13569): ``X_R sqrt(S_R)`` and ``Y_R sqrt(S_R)``, where ``X_R S_R Y_R^T`` is the truncated
      SVD of a Gaussian dense weight.
    - ``spectral_ones``: the same singular vectors with equal singular values. Each is the expected root mean square of
      the singular values of the dense weight.
    - ``orthogonal``: random orthonormal columns with the same equal singular values, and random orthogonal cores.

    The factors are balanced: each carries the singular values to the power ``1 / depth``.

    Args:
        modes: number of columns ``R``.
        init: the initialisation, see above. ``kaiming`` only at depth 2.
        std: standard deviation of the dense weight at initialisation; unused by ``kaiming`` and None.
        depth: number of factors.
        scale: scale of all factors if ``init`` is None and ``depth`` is above 2.
        orthonormal_outer: if ``init`` is None and ``depth`` is above 2, ``U`` and ``V`` have orthonormal columns
            instead, and the cores are ``scale`` times the identity.
    """
    if depth > 2 and init == "kaiming":
        raise ValueError("a deep layer has no initialisation kaiming; write orthogonal")
    if depth > 2 and init is None and orthonormal_outer:
        U, V = (orthonormal_columns(size, modes, generator) for size in (out_features, in_features))
        return Factors(U, V, tuple(scale * torch.eye(modes) for _ in range(depth - 2)))
    if depth > 2 and init in (None, "orthogonal"):
        product = scale**depth if init is None else std * math.sqrt(max(out_features, in_features))
        return _orthogonal_chain(out_features, in_features, modes, depth, product, generator)
    if init is None:
        return Factors(torch.zeros(out_features, modes), orthonormal_columns(in_features, modes, generator))
    if init == "kaiming":
        V = _uniform(in_features, modes, in_features, generator)
        return Factors(_uniform(out_features, modes, max(min(out_features, in_features) // 2, 1), generator), V)
    root_mean_square = math.sqrt(std * math.sqrt(max(out_features, in_features)))
    if init == "orthogonal":
        U = orthonormal_columns(out_features, modes, generator) * root_mean_square
        return Factors(U, orthonormal_columns(in_features, modes, generator) * root_mean_square)
    dense = torch.randn(out_features, in_features, generator=generator) * std
    left, sigma, right = torch.linalg.svd(dense, full_matrices=False)
    root = sigma[:modes].sqrt() if init == "spectral" else torch.full((modes,), root_mean_square)
    return deepened(Factors(left[:, :modes] * root, right[:modes].T * root), depth)


def _orthogonal_chain(
    out_features: int, in_features: int, modes: int, depth: int, product: float, generator: torch.Generator
) -> Factors:
    """Return random orthogonal factors whose product has singular values equal to ``product``."""
    share = product ** (1 / depth)
    U = orthonormal_columns(out_features, modes, generator) * share
    V = orthonormal_columns(in_features, modes, generator) * share
    cores = tuple(orthonormal_columns(modes, modes, generator) * share for _ in range(depth - 2))
    return Factors(U, V, cores)


def deepened(factors: Factors, depth: int) -> Factors:
    """Divide a balanced pair ``X sqrt(S)``, ``Y sqrt(S)`` evenly among ``depth`` factors, with diagonal cores."""
    if depth == 2:
        return factors
    share = factors.V.double().square().sum(0).clamp_min(torch.finfo(torch.float32).tiny) ** (1 / depth)
    rescaled = (share / share ** (depth / 2)).float()
    core = torch.diag(share).float()
    return Factors(factors.U * rescaled, factors.V * rescaled, (core,) * (depth - 2))


def _uniform(rows: int, columns: int, fan_in: int, generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
