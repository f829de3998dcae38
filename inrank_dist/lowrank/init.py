"""How factors and bases start. Every value depends only on the seed and on names, never on processes or order."""

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor

from .spectrum import Factors

Init = Literal["orthogonal", "kaiming", "spectral", "spectral_ones"]


def seed_for(seed: int, *names: object) -> int:
    """A seed for one purpose, 56 bits. The same seed and names give the same one in every process, in any order."""
    digest = hashlib.sha256("\0".join([str(seed), *map(str, names)]).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def generator_for(seed: int, *names: object) -> torch.Generator:
    """A CPU generator of its own for one purpose, seeded by ``seed_for``."""
    return torch.Generator().manual_seed(seed_for(seed, *names))


def orthonormal_columns(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """``(rows, columns)`` float32 with orthonormal columns, uniformly distributed; needs ``columns <= rows``."""
    q, r = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    # The sign that makes the distribution uniform also makes the answer independent of the QR routine's own choice.
    return (q * r.diagonal().sign()).float()


def start_base(out_features: int, in_features: int, init: Init, std: float, generator: torch.Generator) -> Tensor:
    """A dense base ``W0: (out, in)`` float32.

    ``orthogonal``: orthonormal rows or columns times ``std * sqrt(max(out, in))``, the root mean square of the singular
    values of a normal matrix of that standard deviation, so that the scale stays the model's own.
    ``kaiming``: uniform in ``+-1/sqrt(in)`` (PyTorch's default, ``a = sqrt 5``).
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
) -> Factors:
    """Factors ``U: (out, R)`` and ``V: (in, R)``, float32.

    ``None`` (there is a base): ``U = 0`` and ``V`` orthonormal, so that the product is the update and starts at zero.
    Otherwise the product is the layer's whole weight:

    - ``kaiming`` (as in the published code of arXiv 2306.11250): both uniform with ``a = sqrt 5``; the fan-in of ``V``
      is ``in``, that of ``U`` the preallocated ``min(in, out) / 2``.
    - ``spectral`` (arXiv 2209.13569): best rank-``R`` approximation of a normal dense start, ``U_R sqrt(S_R)``, ``V_R
    sqrt(S_R)``.
    - ``spectral_ones``: its singular vectors with equal singular values, here the root mean square of the dense ones.
    - ``orthogonal``: random orthonormal columns with the same equal singular values.

    Args:
        std: standard deviation of the dense start that is imitated; unused by ``kaiming``.
    """
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
    return Factors(left[:, :modes] * root, right[:modes].T * root)


def _uniform(rows: int, columns: int, fan_in: int, generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
