"""Adam's moments through a rank event: what they must become for the optimizer to go on as if nothing had happened."""

from dataclasses import replace

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inrank_dist.lowrank.division import ALONE
from inrank_dist.lowrank.event import (
    RankEvent,
    freeze,
    fresh_share,
    grow,
    map_factors,
    map_first_moment,
    map_second_moment,
    orthogonalise,
)
from inrank_dist.lowrank.spectrum import Factors, gram_matrices, measure_spectra
from inrank_dist.optim import map_moments

BETAS = (0.9, 0.95)


def event_of(Q: Tensor, fresh: int = 0) -> RankEvent:
    """A symmetric event; the columns of ``V @ M`` have squared lengths 1, 2, 3 ..."""
    return RankEvent(Q, Q, fresh, lengths=torch.arange(1, Q.shape[1] + 1, dtype=torch.float64))


def moments(rows: int, R: int, seed: int, steps: int = 7) -> tuple[Tensor, Tensor]:
    """``exp_avg`` and ``exp_avg_sq`` after some real Adam steps on random gradients."""
    m, v = torch.zeros(rows, R), torch.zeros(rows, R)
    for step in range(steps):
        gradient = reference.normal(rows, R, seed + step)
        m.lerp_(gradient, 1 - BETAS[0])
        v.lerp_(gradient.square(), 1 - BETAS[1])
    return m, v


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """Float64 factors ``(20, 6)`` and ``(15, 6)``."""
    return reference.normal(20, 6, 0).double(), reference.normal(15, 6, 1).double()


def curved(W: Tensor) -> Tensor:
    """A loss whose gradient depends on W."""
    return (W.sin() * reference.normal(20, 15, 5).double()).sum()


def linear(W: Tensor) -> Tensor:
    """A loss whose gradient is the same everywhere, so that a truncated product has it too."""
    return (W * reference.normal(20, 15, 5).double()).sum()


@pytest.mark.parametrize(("rank", "loss"), [(6, curved), (6, linear), (3, linear)], ids=["curved", "linear", "cut"])
def test_gradients_move_with_the_other_factors_map(pair: tuple[Tensor, Tensor], rank: int, loss) -> None:
    # g_{U'} = g_U @ M, g_{V'} = g_V @ N, against autograd at the new factors. The first moment is a sum of gradients.
    U, V = pair
    event = freeze(gram_matrices({"layer": Factors(U, V)}, reference.alone)["layer"], rank)
    new = map_factors(event, U, V, None)
    before, after = reference.gradients(U, V, loss), reference.gradients(new.U, new.V, loss)
    assert torch.allclose(map_first_moment(event, before[0], event.M), after[0], rtol=1e-9, atol=1e-10)
    assert torch.allclose(map_first_moment(event, before[1], event.N), after[1], rtol=1e-9, atol=1e-10)


def test_gradients_of_a_grown_layer_are_the_old_ones(pair: tuple[Tensor, Tensor]) -> None:
    U, V = pair
    factors = {"layer": Factors(U, V)}
    Z = reference.normal(15, 3, 9)
    event = orthogonalise({"layer": grow(6, 9)}, factors, measure_spectra(factors, ALONE), {"layer": Z}, ALONE)["layer"]
    new = map_factors(event, U, V, Z)
    before, after = reference.gradients(U, V, curved), reference.gradients(new.U, new.V, curved)
    assert torch.allclose(map_first_moment(event, before[0], event.M)[:, :6], after[0][:, :6], rtol=1e-12, atol=1e-12)
    # V's gradient is known in the fresh columns too: zero, since U is zero there.
    assert torch.allclose(map_first_moment(event, before[1], event.N), after[1], rtol=1e-12, atol=1e-12)


def test_each_factor_takes_the_map_of_the_other(pair: tuple[Tensor, Tensor]) -> None:
    # map_moments is what the engine calls; swapping N and M there would pass every shape check.
    event = freeze(gram_matrices({"layer": Factors(*pair)}, reference.alone)["layer"], 4)
    m, v = moments(8, 6, seed=3)
    held = {"exp_avg": m, "exp_avg_sq": v}
    for factor, other in (("U", event.M), ("V", event.N)):
        mapped = map_moments(event, factor, held, step=7, betas=BETAS)
        assert set(mapped) == {"exp_avg", "exp_avg_sq"}
        assert torch.allclose(mapped["exp_avg"].double(), m.double() @ other, rtol=1e-5, atol=1e-6)
        expected = reference.second_moment(m, v, other, 7, BETAS)
        assert torch.allclose(mapped["exp_avg_sq"].double(), expected, rtol=1e-5, atol=1e-7)
        assert all(moment.dtype == torch.float32 for moment in mapped.values())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 4),
    R=st.integers(1, 5),
    K=st.integers(1, 5),
    fresh=st.integers(0, 3),
    step=st.sampled_from([1, 2, 7, 1000, 100_000]),
    scale=st.sampled_from([1e-12, 1e-4, 1.0, 1e6]),
    betas=st.sampled_from([(0.9, 0.95), (0.9, 0.999), (0.0, 0.95), (0.9, 0.0)]),
    seed=st.integers(0, 10**6),
)
def test_second_moment_equals_the_formula(
    rows: int, R: int, K: int, fresh: int, step: int, scale: float, betas: tuple[float, float], seed: int
) -> None:
    # Any map, any step, gradients from vanishing to huge, shards without rows: LDAdam's formula, never negative, and
    # in new columns a share of the mean of the mapped ones, in U by their partner's squared length.
    m, v = moments(rows, R, seed)
    m, v = (m * scale).double(), (v * scale**2).double()
    Q = reference.normal(R, K, seed + 1).double()
    mapped = map_second_moment(event_of(Q, fresh), m, v, "U", step=step, betas=betas)
    expected = reference.second_moment(m, v, Q, step, betas)
    assert mapped.shape == (rows, K + fresh)
    assert (mapped >= 0).all()
    assert torch.allclose(mapped[:, :K], expected, rtol=1e-8, atol=1e-10 * scale**2)
    per_length = (mapped[:, :K] / torch.arange(1, K + 1)).mean(1, keepdim=True)
    share = fresh_share(betas)
    assert torch.allclose(mapped[:, K:], share * per_length.expand(rows, fresh), rtol=1e-12, atol=0)
    mapped_V = map_second_moment(event_of(Q, fresh), m, v, "V", step=step, betas=betas)
    plain = mapped_V[:, :K].mean(1, keepdim=True)
    assert torch.allclose(mapped_V[:, K:], share * plain.expand(rows, fresh), rtol=1e-12, atol=0)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), R=st.integers(1, 6), step=st.sampled_from([1, 3, 10_000]), seed=st.integers(0, 10**6))
def test_second_moment_is_never_negative_in_float32(rows: int, R: int, step: int, seed: int) -> None:
    # A negative entry would make NaN of the next step. m^2 > v happens: the two averages remember differently.
    m, v = reference.normal(rows, R, seed), reference.normal(rows, R, seed + 1).square() * 1e-3
    Q = reference.orthonormal(R, R, seed + 2)
    mapped = map_second_moment(event_of(Q), m, v, "U", step=step, betas=BETAS)
    assert mapped.isfinite().all()
    assert (mapped >= 0).all()


@pytest.mark.parametrize("fresh", [0, 3])
def test_growth_keeps_both_moments_to_the_bit(fresh: int) -> None:
    # The identity map must not pass through the formula: |(v - m^2) + m^2| is v but for rounding, and v is lost in it
    # where m^2 is far larger.
    m, v = moments(10, 5, seed=0)
    m[0] *= 1e12
    event = replace(grow(5, 5 + fresh), lengths=torch.full((5,), 4.0, dtype=torch.float64))
    mapped = map_moments(event, "U", {"exp_avg": m, "exp_avg_sq": v}, step=7, betas=(0.9, 0.999))
    assert torch.equal(mapped["exp_avg"][:, :5], m)
    assert torch.equal(mapped["exp_avg_sq"][:, :5], v)
    assert torch.equal(mapped["exp_avg"][:, 5:], torch.zeros(10, fresh))
    expected = fresh_share((0.9, 0.999)) * v.mean(1, keepdim=True).expand(10, fresh) / 4
    assert torch.allclose(mapped["exp_avg_sq"][:, 5:], expected)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_after_one_step_the_moments_are_those_of_the_mapped_gradient(betas: tuple[float, float]) -> None:
    # Step 1 is the extreme of the bias correction (v is 1/20 or 1/1000 of g^2) and has an exact answer: no variance.
    gradient = reference.normal(12, 5, 0)
    m, v = (1 - betas[0]) * gradient, (1 - betas[1]) * gradient.square()
    Q = reference.normal(5, 3, 1).double()
    mapped = map_second_moment(event_of(Q), m, v, "U", step=1, betas=betas)
    expected = (1 - betas[1]) * (gradient.double() @ Q).square()
    assert torch.allclose(mapped.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
    assert torch.allclose(
        map_first_moment(event_of(Q), m, Q).double(), (1 - betas[0]) * gradient.double() @ Q, atol=1e-6
    )


def test_rotation_leaves_isotropic_moments_alone() -> None:
    # Pure noise of equal strength in every mode looks the same in any basis.
    strength = reference.normal(9, 1, 0).square().expand(9, 6).contiguous()
    Q = reference.orthonormal(6, 6, 1)
    mapped = map_second_moment(event_of(Q), torch.zeros(9, 6), strength, "U", step=50, betas=BETAS)
    assert torch.allclose(mapped, strength, rtol=1e-6)


def test_permutation_with_signs_permutes_the_moments() -> None:
    # A freeze reorders modes and may flip signs: v follows, m follows with its sign.
    m, v = moments(7, 4, seed=2)
    order = [2, 0, 3, 1]
    Q = torch.eye(4, dtype=torch.float64)[:, order] * torch.tensor([1.0, -1.0, -1.0, 1.0])
    assert torch.allclose(map_second_moment(event_of(Q), m, v, "U", step=7, betas=BETAS), v[:, order], rtol=1e-5)
    assert torch.equal(map_first_moment(event_of(Q), m, Q), m[:, order] * torch.tensor([1.0, -1.0, -1.0, 1.0]))


def test_maps_scale_moments_as_gradients_scale() -> None:
    # U' = U s, V' = V / s: gradients of U shrink by s, of V grow by s; second moments by the squares.
    m, v = moments(7, 4, seed=2)
    Q = torch.eye(4, dtype=torch.float64) / 8
    assert torch.allclose(map_first_moment(event_of(Q), m, Q), m / 8)
    assert torch.allclose(map_second_moment(event_of(Q), m, v, "U", step=7, betas=BETAS), v / 64, rtol=1e-5)


def test_nothing_kept_takes_the_mean_of_the_old_columns() -> None:
    # The freeze of a product that is zero: all modes are fresh.
    m, v = moments(7, 4, seed=2)
    Q = torch.zeros(4, 0, dtype=torch.float64)
    event = event_of(Q, fresh=3)
    assert torch.equal(map_first_moment(event, m, Q), torch.zeros(7, 3))
    mapped = map_second_moment(event, m, v, "U", step=7, betas=(0.9, 0.999))
    assert torch.allclose(mapped, fresh_share((0.9, 0.999)) * v.mean(1, keepdim=True).expand(7, 3))


def test_rows_are_mapped_one_by_one() -> None:
    # Shards hold rows: mapping a part, an empty one too, must be the part of what mapping the whole gives.
    m, v = moments(11, 4, seed=2)
    Q = reference.normal(4, 3, 5).double()
    event = event_of(Q, fresh=2)
    whole = map_moments(event, "U", {"exp_avg": m, "exp_avg_sq": v}, step=7, betas=BETAS)
    parts = [
        map_moments(event, "U", {"exp_avg": m[rows], "exp_avg_sq": v[rows]}, step=7, betas=BETAS)
        for rows in reference.cut(11, 6, seed=1)
    ]
    for name, moment in whole.items():
        assert torch.allclose(torch.cat([part[name] for part in parts]), moment, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("betas", "naive_is"), [((0.9, 0.999), 6.5), ((0.9, 0.95), 1.1), ((0.8, 0.99), 3.0)])
def test_steps_of_fresh_columns_are_not_too_long(betas: tuple[float, float], naive_is: float) -> None:
    # Why not zero: with v = 0 and the step counter kept, Adam does not correct the bias of a new column's moments. Why
    # not the whole mean: it would learn more slowly than it may.
    lr, gradient = 1e-3, torch.ones(6, 4)
    held = {"exp_avg": gradient.clone(), "exp_avg_sq": gradient.square()}
    event = replace(grow(4, 6), lengths=torch.ones(4, dtype=torch.float64))
    mapped = map_moments(event, "U", held, step=5000, betas=betas)

    def longest_step(exp_avg_sq: Tensor) -> Tensor:
        parameter = torch.nn.Parameter(torch.zeros(6, 6))
        optimizer = torch.optim.AdamW([parameter], lr=lr, betas=betas, weight_decay=0.0)
        state = {"step": torch.tensor(5000.0), "exp_avg": mapped["exp_avg"].clone(), "exp_avg_sq": exp_avg_sq}
        optimizer.state[parameter] = state
        longest = torch.zeros(6, 6)
        for _ in range(100):
            before = parameter.detach().clone()
            parameter.grad = torch.ones(6, 6)
            optimizer.step()
            longest = torch.maximum(longest, (parameter.detach() - before).abs() / lr)
        return longest

    naive = mapped["exp_avg_sq"].clone()
    naive[:, 4:] = 0
    assert longest_step(naive)[:, 4:].max() == pytest.approx(naive_is, rel=0.05)
    assert longest_step(mapped["exp_avg_sq"]).max() < 1.101
    assert longest_step(mapped["exp_avg_sq"])[:, 4:].min() > 0.999  # as long as may be
