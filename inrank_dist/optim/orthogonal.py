"""Orthogonalised updates of whole matrices, and of factors from their Gram matrices.

Muon (Jordan et al. 2024; Liu et al., arXiv 2502.16982) replaces the momentum ``X`` of a matrix with a matrix that has
the same singular vectors and singular values near one. A Newton-Schulz step
``X <- a X + b (X X^T) X + c (X X^T)^2 X`` multiplies ``X`` from the right by a polynomial in ``X^T X``. The whole
iteration is therefore ``X @ P``, where ``P: (R, R)`` depends only on the Gram matrix ``X^T X``. The Gram matrix is a
sum over rows, so a factor sharded by rows is orthogonalised without an all-gather.

The updates of a pair of factors ``W = U V^T`` with momenta ``m_U`` and ``m_V`` have the same form:

- Spectron (arXiv 2602.12429): ``orth(m_U) / (|U|_2 + |V|_2 + 1)``, and the same for ``V``. The spectral norm of the
  change of the product is at most about the learning rate.
- LoRA-Muon (arXiv 2606.12921): ``orth(m_U S_V^{-1/2}) S_V^{-1/2} / 2`` with ``S_V = V^T V``, and the same for ``V``
  with ``S_U``. Each factor takes half a step, orthogonal in the metric of the other factor. The change of the product
  does not depend on how its scale is divided between the factors.

All functions of Gram matrices accept batches ``(..., R, R)`` of symmetric float64 matrices.
"""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients ``a, b, c`` of Muon's quintic Newton-Schulz step. The large slope at zero makes small singular values
grow fast. All of them end between about 0.7 and 1.2."""

STEPS = 5
EPS = 1e-7

ROOT_STEPS = 32
"""Steps of the inverse square root. A step multiplies small eigenvalues by 2.25 until they are near one, so that
eigenvalues down to 1e-9 of the trace converge."""

SQUARINGS = 24

_TINY = torch.finfo(torch.float64).tiny


def orthogonalise_matrix(matrix: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Set the singular values of a matrix to about one, as ``torch.optim.Muon`` does.

    Args:
        matrix: ``(out, in)``. It is not modified.
        dtype: dtype of the computation and the result.
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
    """Return ``P`` such that ``X @ P`` is the result of ``orthogonalise_matrix`` for ``X``.

    Args:
        gram: ``X^T X``. If it is zero, ``X @ P`` is zero.
    """
    a, b, c = COEFFICIENTS
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    norm = _trace(gram).clamp(min=EPS**2).sqrt()
    G, P = gram / norm**2, eye / norm
    for _ in range(STEPS):
        step = a * eye + b * G + c * (G @ G)
        P, G = P @ step, step @ G @ step
    return P


def spectral_norm(gram: Tensor) -> Tensor:
    """Return the spectral norm ``|X|_2``, shape ``(..., 1, 1)``, from ``gram = X^T X``.

    On GPUs it uses matrix products only, because batched eigenvalue solvers are slow there.
    """
    if gram.is_cuda:
        return norm_by_squaring(gram)
    return torch.linalg.eigvalsh(gram)[..., -1:, None].clamp(min=0).sqrt()


def inverse_root(gram: Tensor) -> Tensor:
    """Return ``gram^{-1/2}`` of positive definite matrices. On GPUs it uses matrix products only."""
    if gram.is_cuda:
        return root_by_iteration(gram)
    values, vectors = torch.linalg.eigh(gram)
    return vectors / values.clamp(min=_TINY).sqrt()[..., None, :] @ vectors.mT


def norm_by_squaring(gram: Tensor) -> Tensor:
    """Compute ``spectral_norm`` with matrix products only.

    ``trace(gram^n)^(1/n)`` converges to the largest eigenvalue, and ``n`` doubles with each product. The relative error
    is at most ``log(R) / n``. Unlike that of power iteration, it does not depend on the gap to the second eigenvalue.
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
    """Compute ``inverse_root`` with matrix products only.

    It is the coupled Newton-Schulz iteration (Higham 2008, "Functions of Matrices", equation 6.35) with a fixed number
    of steps, so that the host does not synchronise with the device.
    """
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    scale = _trace(gram).clamp(min=_TINY)
    Y, Z = gram / scale, eye.expand_as(gram)
    for _ in range(ROOT_STEPS):
        step = 1.5 * eye - 0.5 * Z @ Y
        Y, Z = Y @ step, step @ Z
    return Z / scale.sqrt()


def spectron_maps(U: Tensor, V: Tensor, m_U: Tensor, m_V: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``A, B`` of Spectron, such that the updates are ``m_U @ A`` and ``m_V @ B``.

    Args:
        U, V: Gram matrices of the factors.
        m_U, m_V: Gram matrices of their momenta.
    """
    scale = spectral_norm(U) + spectral_norm(V) + 1
    return orthogonalising_map(m_U) / scale, orthogonalising_map(m_V) / scale


def lora_muon_maps(U: Tensor, V: Tensor, m_U: Tensor, m_V: Tensor, damping: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return ``A, B`` of LoRA-Muon, such that the updates are ``m_U @ A`` and ``m_V @ B``.

    New modes have ``U = 0``, for which ``S_U^{-1/2}`` is infinite. Therefore ``damping`` times the mean eigenvalue of
    the other factor's Gram matrix is added to the diagonal of each.

    Args:
        U, V: Gram matrices of the factors.
        m_U, m_V: Gram matrices of their momenta.
        damping: multiple of the mean eigenvalue.
    """
    eye = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
    floor = damping / U.shape[-1]
    root_U, root_V = inverse_root(U + floor * _trace(V) * eye), inverse_root(V + floor * _trace(U) * eye)
    return _half_step(m_U, root_V), _half_step(m_V, root_U)


def _half_step(momentum: Tensor, root: Tensor) -> Tensor:
    return 0.5 * root @ orthogonalising_map(root @ momentum @ root) @ root


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
