"""Orthogonalised updates, and the optimizers that are made of them, against whole matrices in float64."""

import math
from collections.abc import Callable

import pytest
import reference
import reference_step
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from inrank_dist.optim.groups import parameter_roles
from inrank_dist.optim.matrices import HeldRows, MatrixOptimizer, Pair
from inrank_dist.optim.orthogonal import (
    inverse_root,
    lora_muon_maps,
    norm_by_squaring,
    orthogonalise_matrix,
    orthogonalising_map,
    root_by_iteration,
    spectral_norm,
    spectron_maps,
)
from inrank_dist.optim.settings import OptimizerSettings
from inrank_dist.runtime.errors import UserError

WHOLE = HeldRows(lambda tensor: tensor.detach(), lambda tensor: None, lambda size: [size])


def matrix(rows: int, columns: int, seed: int, condition: float = 1.0) -> Tensor:
    """Float64, its singular values spread evenly on a log scale over ``condition``."""
    left = torch.linalg.qr(reference.normal(rows, columns, seed).double())[0]
    right = torch.linalg.qr(reference.normal(columns, columns, seed + 1).double())[0]
    return left * torch.logspace(0, -math.log10(condition), columns, dtype=torch.float64) @ right.T


def gram(X: Tensor) -> Tensor:
    return X.T @ X


@pytest.mark.parametrize(("rows", "columns"), [(40, 7), (7, 7), (9, 1), (300, 64)])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e9])
def test_the_map_from_a_gram_does_what_the_iteration_does(rows: int, columns: int, condition: float) -> None:
    X = matrix(rows, columns, 0, condition)
    expected = orthogonalise_matrix(X, torch.float64)
    assert torch.allclose(X @ orthogonalising_map(gram(X)), expected, rtol=0, atol=1e-9)
    assert torch.allclose(expected, reference_step.newton_schulz(X), rtol=0, atol=1e-12)
    if condition == 1.0:
        values = torch.linalg.svdvals(expected)
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3


def test_a_momentum_of_zero_moves_nothing() -> None:
    assert not orthogonalise_matrix(torch.zeros(5, 3)).any()
    assert not (torch.zeros(5, 3, dtype=torch.float64) @ orthogonalising_map(torch.zeros(3, 3).double())).any()


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_inverse_roots_and_norms_of_a_batch(condition: float) -> None:
    """Those from eigenvalues, and those from products, which GPUs take."""
    scales = ((0, 1.0), (2, 1e-3), (4, 50.0))
    grams = torch.stack([gram(scale * matrix(30, 6, seed, condition)) for seed, scale in scales])
    eye = torch.eye(6, dtype=torch.float64).expand(3, 6, 6)
    for root in (inverse_root, root_by_iteration):
        roots = root(grams)
        assert torch.allclose(roots @ grams @ roots, eye, rtol=0, atol=1e-14 * condition**2 + 1e-12)
    norms = torch.tensor([scale for _, scale in scales], dtype=torch.float64)
    for norm in (spectral_norm, norm_by_squaring):
        assert torch.allclose(norm(grams).flatten(), norms, rtol=1e-6, atol=0)
        assert float(norm(torch.zeros(1, 6, 6, dtype=torch.float64))) < 1e-100


def test_spectron_moves_a_product_by_no_more_than_its_rate() -> None:
    U, V = matrix(40, 5, 0, 10.0), 3 * matrix(30, 5, 2, 10.0)
    m_U, m_V = matrix(40, 5, 4, 50.0), matrix(30, 5, 6, 50.0)
    A, B = spectron_maps(*(gram(X) for X in (U, V, m_U, m_V)))
    lr = 0.05
    change = (U - lr * m_U @ A) @ (V - lr * m_V @ B).T - U @ V.T
    assert 0.3 * lr < float(torch.linalg.matrix_norm(change, 2)) < 1.3 * lr


def lora_muon_change(U: Tensor, V: Tensor, gradient: Tensor, lr: float, damping: float) -> Tensor:
    """What one step from a momentum of zero does to the product."""
    m_U, m_V = gradient @ V, gradient.T @ U
    A, B = lora_muon_maps(*(gram(X) for X in (U, V, m_U, m_V)), damping=damping)
    return (U - lr * m_U @ A) @ (V - lr * m_V @ B).T - U @ V.T


def test_lora_muon_does_not_see_how_scale_is_divided() -> None:
    U, V, gradient = matrix(40, 5, 0, 10.0), matrix(30, 5, 2, 10.0), reference.normal(40, 30, 4).double()
    expected = lora_muon_change(U, V, gradient, 0.01, 1e-12)
    assert 0.005 < float(torch.linalg.matrix_norm(expected, 2)) < 0.02
    mixing = matrix(5, 5, 6, 20.0)  # U M, V M^{-T}: the same product
    for changed in ((7 * U, V / 7), (U @ mixing, V @ torch.linalg.inv(mixing).T)):
        got = lora_muon_change(*changed, gradient, 0.01, 1e-12)
        assert torch.allclose(got, expected, rtol=0, atol=1e-6)


def test_modes_that_start_at_zero_start_at_the_pace_of_the_others() -> None:
    """New modes have ``U = 0``, where the rule as it was published takes an infinite step."""
    U, V, gradient = matrix(40, 5, 0, 3.0), matrix(30, 5, 2, 3.0), reference.normal(40, 30, 4).double()
    whole = float(torch.linalg.matrix_norm(lora_muon_change(U, V, gradient, 0.01, 0.1), 2))
    grown = torch.cat([U, torch.zeros(40, 3, dtype=torch.float64)], 1), torch.cat([V, matrix(30, 3, 6)], 1)
    change = lora_muon_change(*grown, gradient, 0.01, 0.1)
    assert 0.5 * whole < float(torch.linalg.matrix_norm(change, 2)) < 2 * whole
    alone = torch.zeros(40, 3, dtype=torch.float64), matrix(30, 3, 6)
    assert 0.05 * whole < float(torch.linalg.matrix_norm(lora_muon_change(*alone, gradient, 0.01, 0.1), 2)) < 2 * whole


def optimizer_of(
    dense: list[nn.Parameter], pairs: list[Pair], decay: float, maps: Callable[..., tuple[Tensor, Tensor]] | None
) -> MatrixOptimizer:
    return MatrixOptimizer(
        [], [{"params": dense, "weight_decay": decay}], [(pairs, decay)], WHOLE,
        maps=maps, lr=1e-3, matrix_lr=0.02, momentum=0.95, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip


def test_dense_matrices_move_as_torchs_muon_moves_them() -> None:
    shapes = [(24, 10), (10, 24), (16, 16)]
    ours, theirs = ([nn.Parameter(reference.normal(*shape, i)) for i, shape in enumerate(shapes)] for _ in range(2))
    optimizers = optimizer_of(ours, [], 0.1, None), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95)
    for step in range(5):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for index, parameter in enumerate(parameters):
                parameter.grad = reference.normal(*shapes[index], 10 * step + index)
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def test_a_convolution_moves_as_its_matrix() -> None:
    """Wide, tall and square: one row a channel."""
    for shape in ((6, 4, 3, 3), (40, 2, 3, 3), (18, 2, 3, 3)):
        rows, columns = shape[0], math.prod(shape[1:])
        flat = nn.Parameter(reference.normal(rows, columns, 1))
        weight = nn.Parameter(flat.detach().clone().view(shape))
        flat.grad = reference.normal(rows, columns, 2)
        weight.grad = flat.grad.clone().view(shape)
        for parameter in (weight, flat):
            optimizer_of([parameter], [], 0.1, None).step()
        assert torch.equal(weight.flatten(1), flat)


def test_which_layers_are_matrices() -> None:
    """Those of every registered kind within the blocks; a transposed one is refused."""
    block = nn.ModuleList([nn.Linear(4, 4), nn.Conv2d(2, 3, 3)])
    model = nn.ModuleDict({"block": block, "head": nn.Linear(4, 4)})
    roles = parameter_roles(model, [block], OptimizerSettings(name="muon"))
    assert {name for name, role in roles.items() if role == "dense"} == {"block.0.weight", "block.1.weight"}
    transformers_layer = Conv1D(4, 4)
    with pytest.raises(UserError, match=r"Conv1D.*write optimizer.name: adamw"):
        parameter_roles(transformers_layer, [transformers_layer], OptimizerSettings(name="muon"))


@pytest.mark.parametrize("maps", [spectron_maps, lora_muon_maps])
def test_the_product_decays_as_a_dense_matrix_does(maps: Callable[..., tuple[Tensor, Tensor]]) -> None:
    U, V = (nn.Parameter(reference.normal(size, 4, size)) for size in (20, 12))
    before = reference.product(U, V)
    optimizer = optimizer_of([], [Pair(U, V)], 0.5, maps)
    U.grad, V.grad = torch.zeros_like(U), torch.zeros_like(V)
    optimizer.step()
    assert torch.allclose(reference.product(U, V), (1 - 0.02 * 0.5) * before, rtol=0, atol=2e-6)
