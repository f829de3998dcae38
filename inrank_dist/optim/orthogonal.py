"""Orthogonalised updates: of a whole matrix, and of factors from their Gram matrices alone.

Muon (Jordan et al. 2024; Liu et al., arXiv 2502.16982) replaces the momentum ``X`` of a matrix by a matrix with the
same singular vectors and singular values near one. A Newton-Schulz step ``X <- a X + b (X X^T) X + c (X X^T)^2 X``
multiplies ``X`` from the right by a polynomial of ``X^T X``. So the whole iteration is ``X @ P`` with ``P: (R, R)``
from the Gram ``X^T X``, which is a sum over rows: a factor that is sharded by rows is orthogonalised without being
gathered.

The updates of a pair of factors ``W = U V^T`` are of that form too. With ``m_U, m_V`` the momenta:

- Spectron (arXiv 2602.12429): ``orth(m_U) / (|U|_2 + |V|_2 + 1)``, and the same for ``V``. The product moves by at most
  about the learning rate in spectral norm.
- LoRA-Muon (arXiv 2606.12921): ``orth(m_U S_V^{-1/2}) S_V^{-1/2} / 2`` with ``S_V = V^T V``, and the same for ``V``
  with ``S_U``. Each factor takes half a step, orthogonal in the metric of the other, so that the step of the product
  does not depend on how scale is divided between the factors.

All functions of Grams work on batches ``(..., R, R)`` of symmetric float64 matrices.
"""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz step of Muon: steep at zero; singular values end between about 0.7 and 1.2."""

STEPS = 5
EPS = 1e-7

ROOT_STEPS = 32
"""Each step multiplies a small eigenvalue by 2.25 until it is near one: enough for 1e-9 of the trace."""

SQUARINGS = 24

_TINY = torch.finfo(torch.float64).tiny


def orthogonalise_matrix(matrix: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Near-orthogonal factor of a whole matrix ``(out, in)``, as ``torch.optim.Muon`` computes it.

    Args:
        dtype: in which it is computed and returned.
    """
    a, b, c = COEFFICIENTS
    X = matrix.to(dtype, copy=True)
    if matrix.shape[0] > matrix.shape[1]:
        X = X.T
    X.div_(X.norm().clamp(min=EPS))
    for _ in range(STEPS):
        gram = X @ X.T
        X = torch.addmm(X, torch.addmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.T if matrix.shape[0] > matrix.shape[1] else X


def orthogonalising_map(gram: Tensor) -> Tensor:
    """``P`` such that ``X @ P`` is the near-orthogonal factor of ``X``, from ``gram = X^T X``; zero for a zero Gram."""
    a, b, c = COEFFICIENTS
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    norm = _trace(gram).clamp(min=EPS**2).sqrt()
    G, P = gram / norm**2, eye / norm
    for _ in range(STEPS):
        step = a * eye + b * G + c * (G @ G)
        P, G = P @ step, step @ G @ step
    return P


def spectral_norm(gram: Tensor) -> Tensor:
    """``|X|_2``, shape ``(..., 1, 1)``, from ``gram = X^T X``; from eigenvalues on CPUs, by products on GPUs, where
    eigenvalues of a batch are slow."""
    if gram.is_cuda:
        return norm_by_squaring(gram)
    return torch.linalg.eigvalsh(gram)[..., -1:, None].clamp(min=0).sqrt()


def inverse_root(gram: Tensor) -> Tensor:
    """``gram^{-1/2}`` of positive definite matrices; from eigenvectors on CPUs, by products on GPUs."""
    if gram.is_cuda:
        return root_by_iteration(gram)
    values, vectors = torch.linalg.eigh(gram)
    return vectors / values.clamp(min=_TINY).sqrt()[..., None, :] @ vectors.mT


def norm_by_squaring(gram: Tensor) -> Tensor:
    """``spectral_norm`` from products alone.

    The trace of ``gram^n`` to the power ``1 / n`` tends to the largest eigenvalue, and ``n`` doubles with each product.
    It is exact to a share of ``log(R) / n`` whatever the gap to the second eigenvalue, where power iterations are not.
    """
    log_norm = torch.zeros_like(_trace(gram))
    power = gram
    for step in range(SQUARINGS + 1):
        trace = _trace(power).clamp(min=_TINY)
        log_norm += trace.log() / 2**step
        power = power / trace
        power = power @ power
    return (log_norm / 2).exp()


def root_by_iteration(gram: Tensor) -> Tensor:
    """``inverse_root`` from products alone: the coupled Newton-Schulz iteration (Higham 2008, "Functions of Matrices",
    equation 6.35). It never looks at its result, so the host does not wait for the device."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    scale = _trace(gram).clamp(min=_TINY)
    Y, Z = gram / scale, eye.expand_as(gram)
    for _ in range(ROOT_STEPS):
        step = 1.5 * eye - 0.5 * Z @ Y
        Y, Z = Y @ step, step @ Z
    return Z / scale.sqrt()


def spectron_maps(U: Tensor, V: Tensor, m_U: Tensor, m_V: Tensor) -> tuple[Tensor, Tensor]:
    """Maps ``A, B`` of Spectron: the updates are ``m_U @ A`` and ``m_V @ B``. Arguments are Grams of what they name."""
    scale = spectral_norm(U) + spectral_norm(V) + 1
    return orthogonalising_map(m_U) / scale, orthogonalising_map(m_V) / scale


def lora_muon_maps(U: Tensor, V: Tensor, m_U: Tensor, m_V: Tensor, damping: float = 0.1) -> tuple[Tensor, Tensor]:
    """Maps ``A, B`` of LoRA-Muon: the updates are ``m_U @ A`` and ``m_V @ B``. Arguments are Grams of what they name.

    New modes have ``U = 0``, where ``S_U^{-1/2}`` is infinite. So ``damping`` times the mean eigenvalue of the other
    factor's Gram is added to the diagonal of each.
    """
    eye = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
    floor = damping / U.shape[-1]
    root_U, root_V = inverse_root(U + floor * _trace(V) * eye), inverse_root(V + floor * _trace(U) * eye)
    return _half_step(m_U, root_V), _half_step(m_V, root_U)


def _half_step(momentum: Tensor, root: Tensor) -> Tensor:
    return 0.5 * root @ orthogonalising_map(root @ momentum @ root) @ root


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
