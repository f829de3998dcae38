"""How factors and bases start: the stated scale and spectrum, and numbers that follow from seed and names alone."""

import math

import pytest
import reference
import torch

from inrank_dist.lowrank.init import generator_for, orthonormal_columns, start_base, start_factors

SHAPES = [(60, 40), (40, 60), (24, 24)]
STD = 0.02


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rms_of_dense_values(out: int, in_: int) -> float:
    """Root mean square of the singular values of a normal matrix: ``|W|_F^2`` is ``out * in * std^2`` on average."""
    return STD * math.sqrt(out * in_ / min(out, in_))


def test_generators_are_independent_of_order_and_of_the_global_one() -> None:
    # Every process draws only what it needs, in its own order; the numbers must not depend on it.
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = torch.randn(5, generator=generator_for(3, "layer", "base"))
    torch.randn(7, generator=generator_for(3, "other"))
    torch.manual_seed(2)
    assert torch.equal(first, torch.randn(5, generator=generator_for(3, "layer", "base")))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_generators_differ_by_seed_and_by_every_name() -> None:
    keys = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "ab"), (0, "a", 1), (0, "a", 2), (1, "a"), (0, 1, "a")]
    seeds = {generator_for(*key).initial_seed() for key in keys}
    assert len(seeds) == len(keys)


def test_seed_of_a_name_never_changes() -> None:
    # A resumed run draws its fresh directions again; another hash would silently give it other ones.
    assert generator_for(0, "blocks.0.mlp.up", "growth", 25).initial_seed() == 52_761_558_431_005_117


@pytest.mark.parametrize(("rows", "columns"), [(40, 7), (40, 40), (5, 1)])
def test_orthonormal_columns(rows: int, columns: int) -> None:
    q = orthonormal_columns(rows, columns, generator())
    assert q.dtype == torch.float32
    assert q.shape == (rows, columns)
    assert torch.allclose(q.T @ q, torch.eye(columns), atol=1e-6)
    assert torch.equal(q, orthonormal_columns(rows, columns, generator()))


def test_orthonormal_columns_prefer_no_direction() -> None:
    # A bare QR gives a first entry of fixed sign, so the average matrix would not be zero.
    total = sum(orthonormal_columns(3, 2, generator(seed)) for seed in range(600)) / 600
    assert total.abs().max() < 5 / math.sqrt(3 * 600)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_orthogonal_base_has_equal_values_of_the_models_own_scale(out: int, in_: int) -> None:
    base = start_base(out, in_, "orthogonal", STD, generator())
    assert base.shape == (out, in_)
    assert base.dtype == torch.float32
    sigma = torch.linalg.svdvals(base.double())
    assert torch.allclose(sigma, torch.full_like(sigma, rms_of_dense_values(out, in_)), rtol=1e-5)
    # The rule against a real normal matrix, not against itself.
    dense = torch.linalg.svdvals(torch.randn(out, in_, generator=generator(5)) * STD)
    assert float(sigma[0]) == pytest.approx(float(dense.square().mean().sqrt()), rel=0.05)
    assert float(base.square().mean().sqrt()) == pytest.approx(STD, rel=1e-5)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_kaiming_base_is_that_of_torch(out: int, in_: int) -> None:
    base = start_base(out, in_, "kaiming", STD, generator())
    bound = 1 / math.sqrt(in_)
    torch.manual_seed(0)
    assert base.shape == (out, in_)
    assert 0.98 * bound < base.abs().max() <= bound
    assert float(base.square().mean()) == pytest.approx(bound**2 / 3, rel=0.1)
    linear = torch.nn.Linear(in_, out).weight.detach()
    assert float(base.std()) == pytest.approx(float(linear.std()), rel=0.1)


@pytest.mark.parametrize("init", ["spectral", "spectral_ones"])
def test_a_base_has_no_spectral_start(init: str) -> None:
    with pytest.raises(ValueError, match=f"not as {init}"):
        start_base(6, 4, init, STD, generator())  # type: ignore[arg-type]


@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_with_a_base_the_product_starts_at_zero_and_can_learn(out: int, in_: int) -> None:
    factors = start_factors(out, in_, 9, None, STD, generator())
    assert torch.equal(factors.U, torch.zeros(out, 9))
    assert factors.V.shape == (in_, 9)
    assert torch.allclose(factors.V.T @ factors.V, torch.eye(9), atol=1e-6)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_kaiming_factors_are_as_published(out: int, in_: int) -> None:
    # Fan-in of V is in; of U the preallocated min(in, out) / 2, whatever the number of modes is now.
    factors = start_factors(out, in_, 9, "kaiming", STD, generator())
    for factor, rows, fan_in in ((factors.U, out, min(out, in_) // 2), (factors.V, in_, in_)):
        bound = 1 / math.sqrt(fan_in)
        assert factor.shape == (rows, 9)
        assert 0.95 * bound < factor.abs().max() <= bound
        assert float(factor.square().mean()) == pytest.approx(bound**2 / 3, rel=0.15)
    assert start_factors(1, 1, 1, "kaiming", STD, generator()).U.isfinite().all()


@pytest.mark.parametrize("modes", [1, 9, 24])
@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_spectral_factors_are_the_best_approximation_of_the_dense_start(out: int, in_: int, modes: int) -> None:
    factors = start_factors(out, in_, modes, "spectral", STD, generator())
    dense = torch.randn(out, in_, generator=generator()) * STD
    best = reference.product(*reference.frozen(dense, torch.eye(in_), modes))
    assert torch.allclose(reference.product(factors.U, factors.V), best, rtol=0, atol=1e-6 * STD * math.sqrt(out * in_))
    # Balanced: the same Gram on both sides.
    assert torch.allclose(factors.U.T @ factors.U, factors.V.T @ factors.V, atol=1e-6)


@pytest.mark.parametrize("modes", [1, 9, 24])
@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_spectral_ones_keeps_the_directions_and_evens_the_values(out: int, in_: int, modes: int) -> None:
    ones = start_factors(out, in_, modes, "spectral_ones", STD, generator())
    spectral = start_factors(out, in_, modes, "spectral", STD, generator())
    sigma = reference.spectrum(ones.U, ones.V)
    assert torch.allclose(sigma, torch.full_like(sigma, rms_of_dense_values(out, in_)), rtol=1e-5)
    for one, other in ((ones.U, spectral.U), (ones.V, spectral.V)):
        assert torch.allclose(one / one.norm(dim=0), other / other.norm(dim=0), atol=1e-5)


@pytest.mark.parametrize("modes", [1, 9, 24])
@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_orthogonal_factors_have_equal_values(out: int, in_: int, modes: int) -> None:
    factors = start_factors(out, in_, modes, "orthogonal", STD, generator())
    sigma = reference.spectrum(factors.U, factors.V)
    assert torch.allclose(sigma, torch.full_like(sigma, rms_of_dense_values(out, in_)), rtol=1e-5)
    scale = rms_of_dense_values(out, in_)
    for factor in (factors.U, factors.V):
        assert torch.allclose(factor.T @ factor, scale * torch.eye(modes), atol=1e-6)


@pytest.mark.parametrize("init", [None, "kaiming", "spectral", "spectral_ones", "orthogonal"])
def test_factors_are_float32_and_follow_from_the_generator(init) -> None:
    one, same, other = (start_factors(30, 20, 5, init, STD, generator(seed)) for seed in (0, 0, 1))
    assert one.U.dtype == one.V.dtype == torch.float32
    assert torch.equal(one.U, same.U)
    assert torch.equal(one.V, same.V)
    assert not torch.equal(one.V, other.V)
