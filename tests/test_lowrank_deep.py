"""Deep layers: product, rank events and gradients of all factors, against float64 references and autograd."""

from dataclasses import replace

import pytest
import reference
import torch
from torch import Tensor, nn

from inrank_dist.lowrank.convert import LayerLayout, convert
from inrank_dist.lowrank.cores import absorbed, cores_of, map_core, product_gradients
from inrank_dist.lowrank.division import ALONE, Processes
from inrank_dist.lowrank.event import RankEvent, freeze_all, fresh_share, grow, map_factors, orthogonalise
from inrank_dist.lowrank.init import generator_for, start_factors
from inrank_dist.lowrank.layer import LowRankLayer
from inrank_dist.lowrank.merge import merge
from inrank_dist.lowrank.spectrum import FactorRows, Factors, gram_matrices, measure_spectra
from inrank_dist.optim import map_moments

BETAS, STEP = (0.9, 0.999), 7
OUT, IN, R = 20, 15, 6
DEPTHS = [3, 4, 5]


def chain(depth: int, seed: int = 0) -> Factors:
    """Unbalanced float64 factors of a deep layer, with cores of moderate condition."""
    cores = tuple(
        reference.orthonormal(R, R, seed + j) * torch.linspace(0.5, 2, R, dtype=torch.float64) for j in range(depth - 2)
    )
    return Factors(reference.normal(OUT, R, seed).double(), reference.normal(IN, R, seed + 9).double(), cores)


def weight(factors: Factors) -> Tensor:
    """``U C_k ... C_1 V^T``."""
    left = factors.U
    for core in reversed(factors.cores):
        left = left @ core
    return left @ factors.V.T


def named(factors: Factors) -> dict[str, Tensor]:
    cores = {f"C{j}": core for j, core in enumerate(factors.cores, start=1)}
    return {"U": factors.U, "V": factors.V, **cores}


def gradients(factors: Factors, loss) -> dict[str, Tensor]:
    """The gradients of all factors by autograd."""
    leaves = {name: factor.detach().clone().requires_grad_() for name, factor in named(factors).items()}
    U, V, *cores = leaves.values()
    loss(weight(Factors(U, V, tuple(cores)))).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def curved(W: Tensor) -> Tensor:
    return (W.sin() * reference.normal(OUT, IN, 5).double()).sum()


def linear(W: Tensor) -> Tensor:
    return (W * reference.normal(OUT, IN, 5).double()).sum()


def completed(event: RankEvent, rows: Factors) -> tuple[RankEvent, Tensor | None]:
    """An event with its fresh columns, and the random directions of these."""
    if not event.fresh:
        return event, None
    Z = reference.normal(IN, event.fresh, 99).double()
    pair: dict[str, FactorRows] = {"layer": absorbed(rows)}
    return orthogonalise({"layer": event}, pair, measure_spectra(pair, ALONE), {"layer": Z}, ALONE)["layer"], Z


def frozen(rows: Factors, rank: int) -> tuple[RankEvent, Tensor | None]:
    pair: dict[str, FactorRows] = {"layer": absorbed(rows)}
    events = freeze_all(measure_spectra(pair, ALONE), {"layer": rank}, ALONE, {"layer": cores_of(pair["layer"])})
    return completed(events["layer"], rows)


def grown(rows: Factors, modes: int) -> tuple[RankEvent, Tensor | None]:
    return completed(grow(R, modes, cores_of(absorbed(rows))), rows)


def applied(event: RankEvent, rows: Factors, Z: Tensor | None) -> Factors:
    assert event.cores is not None
    new = map_factors(event, rows.U, rows.V, Z)
    cores = tuple(map_core(event.cores, j, event.fresh) for j in range(1, len(rows.cores) + 1))
    return Factors(new.U, new.V, cores)


@pytest.mark.parametrize("depth", [2, *DEPTHS])
@pytest.mark.parametrize("base", [False, True])
def test_the_layer_is_its_product_and_merges(depth: int, base: bool) -> None:
    torch.manual_seed(0)
    skeleton = nn.Sequential(nn.Linear(15, 20), nn.Unflatten(1, (5, 2, 2)), nn.Conv2d(5, 7, (2, 1), padding=1))
    layout = {name: LayerLayout(2, 4, base, depth) for name in ("0", "2")}
    model = convert(skeleton.to("meta"), layout).to_empty(device="cpu").double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    for module in model.modules():
        if isinstance(module, LowRankLayer):
            assert len(module.cores) == depth - 2
            if module.base_scale is not None:
                module.base_scale.fill_(0.5)
    x = torch.randn(3, 15, dtype=torch.float64)
    dense = merge(model, skeleton.double())
    torch.testing.assert_close(dense(x), model(x), rtol=1e-10, atol=1e-10)
    first = model[0]
    U, V, *cores = [first.U, first.V, *first.cores]
    expected = weight(Factors(U, V, tuple(cores))) + (0.5 * first.base if base else 0)
    torch.testing.assert_close(dense[0].weight, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("depth", DEPTHS)
def test_initial_factors_are_orthogonal_and_balanced(depth: int) -> None:
    def start(init, **options) -> Factors:
        return start_factors(OUT, IN, R, init, 0.02, generator_for(0, "layer"), **options)

    # With a base: all factors orthogonal at a scale, the product at its power.
    deep = start(None, depth=depth, scale=0.3)
    assert len(deep.cores) == depth - 2
    for factor in named(deep).values():
        torch.testing.assert_close(factor.T @ factor, 0.09 * torch.eye(R))
    torch.testing.assert_close(torch.linalg.svdvals(weight(deep))[:R], torch.full((R,), 0.3**depth))
    # Without one: the singular values of the same initialisation at depth 2, evenly divided.
    for init in ("orthogonal", "spectral", "spectral_ones"):
        shallow, deep = start(init), start(init, depth=depth)
        sigma = torch.linalg.svdvals(weight(shallow))[:R]
        torch.testing.assert_close(torch.linalg.svdvals(weight(deep))[:R], sigma)
        for factor in named(deep).values():
            torch.testing.assert_close(torch.linalg.svdvals(factor), sigma ** (1 / depth))
        if init != "orthogonal":
            torch.testing.assert_close(weight(deep), weight(shallow))
    with pytest.raises(ValueError, match="kaiming"):
        start("kaiming", depth=depth)


@pytest.mark.parametrize("depth", DEPTHS)
def test_spectra_of_uneven_shards_are_those_of_the_product(depth: int) -> None:
    rows = chain(depth)
    cuts = zip(reference.cut(OUT, 3, 1), reference.cut(IN, 3, 2), strict=True)
    shards = [absorbed(Factors(rows.U[u], rows.V[v], rows.cores)) for u, v in cuts]
    processes = reference.Processes(3)
    results = processes.run(
        lambda rank, total: measure_spectra({"layer": shards[rank]}, Processes(rank, 3, total)).sigma["layer"]
    )
    for sigma in results:
        torch.testing.assert_close(sigma, torch.linalg.svdvals(weight(rows))[:R], rtol=1e-10, atol=0)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("rank", [1, 3, R])
def test_freeze_is_the_best_approximation_in_balanced_factors(depth: int, rank: int) -> None:
    rows = chain(depth)
    new = applied(*frozen_and_rows(rows, rank))
    X, S, Yh = torch.linalg.svd(weight(rows), full_matrices=False)
    best = X[:, :rank] * S[:rank] @ Yh[:rank]
    assert float((weight(new) - best).norm()) <= 1e-10 * float(S[0])
    share = torch.diag(S[:rank] ** (2 / depth))
    for factor in named(new).values():
        torch.testing.assert_close(factor.T @ factor, share, rtol=1e-9, atol=1e-9)


def frozen_and_rows(rows: Factors, rank: int) -> tuple[RankEvent, Factors, Tensor | None]:
    event, Z = frozen(rows, rank)
    return event, rows, Z


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_freeze_above_the_rank_of_the_product_leaves_no_dead_mode(depth: int) -> None:
    rows = chain(depth)
    rows = replace(rows, U=rows.U * torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64))
    # Three modes of U are zero; the product has rank 3.
    event, Z = frozen(rows, 5)
    assert event.fresh == 2
    new = applied(event, rows, Z)
    assert float((weight(new) - weight(rows)).norm()) <= 1e-9
    assert (gradients(new, linear)["U"].norm(dim=0) > 1e-3).all()


@pytest.mark.parametrize("depth", DEPTHS)
def test_growth_keeps_the_product_and_new_modes_start_as_fast_as_at_depth_2(depth: int) -> None:
    rows = chain(depth)
    event, Z = grown(rows, R + 3)
    new = applied(event, rows, Z)
    torch.testing.assert_close(weight(new), weight(rows), rtol=0, atol=1e-12)
    for name, factor in named(rows).items():
        assert torch.equal(named(new)[name][: len(factor), :R], factor)
    assert torch.equal(new.U[:, R:], torch.zeros(OUT, 3).double())
    fresh = new.V[:, R:]
    torch.testing.assert_close(fresh.T @ fresh, torch.eye(3).double(), rtol=0, atol=1e-10)
    G = reference.normal(OUT, IN, 5).double()
    torch.testing.assert_close(gradients(new, linear)["U"][:, R:], G @ fresh)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(("rank", "loss"), [(R, curved), (R, linear), (3, linear)], ids=["curved", "linear", "cut"])
def test_first_moments_move_as_gradients_do(depth: int, rank: int, loss) -> None:
    rows = chain(depth)
    event, Z = frozen(rows, rank)
    before, after = gradients(rows, loss), gradients(applied(event, rows, Z), loss)
    for name, gradient in before.items():
        mapped = map_moments(event, name, {"exp_avg": gradient}, step=STEP, betas=BETAS)["exp_avg"]
        torch.testing.assert_close(mapped, after[name], rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("depth", DEPTHS)
def test_first_moments_of_a_grown_layer(depth: int) -> None:
    rows = chain(depth)
    event, Z = grown(rows, R + 2)
    before, after = gradients(rows, curved), gradients(applied(event, rows, Z), curved)
    for name, gradient in before.items():
        mapped = map_moments(event, name, {"exp_avg": gradient}, step=STEP, betas=BETAS)["exp_avg"]
        assert mapped.shape == after[name].shape
        torch.testing.assert_close(mapped[: len(gradient), :R], after[name][: len(gradient), :R])
        # Unknown is only what reads the new directions: their columns of U, and of the cores in the old rows.
        torch.testing.assert_close(mapped[len(gradient) :], torch.zeros_like(mapped[len(gradient) :]))
        torch.testing.assert_close(after[name][len(gradient) :], torch.zeros_like(mapped[len(gradient) :]))
    torch.testing.assert_close(
        map_moments(event, "V", {"exp_avg": before["V"]}, step=STEP, betas=BETAS)["exp_avg"], after["V"]
    )


def test_second_moments_of_cores_equal_the_formula_entry_by_entry() -> None:
    rows = chain(4)
    event, _ = frozen(rows, 3)
    assert event.cores is not None
    corrections = [1 - beta**STEP for beta in BETAS]
    m, v = reference.normal(R, R, 1).double(), reference.normal(R, R, 2).double().square()
    for index in (1, 2):
        moments = {"exp_avg": m * corrections[0], "exp_avg_sq": v * corrections[1]}
        mapped = map_moments(event, f"C{index}", moments, step=STEP, betas=BETAS)["exp_avg_sq"]
        L, Q = event.cores.left[index], event.cores.right[index - 1]
        for i in range(3):
            for k in range(3):
                weights = torch.outer(L[:, i], Q[:, k])
                expected = ((v - m.square()) * weights.square()).sum() + (m * weights).sum().square()
                torch.testing.assert_close(mapped[i, k], expected.abs() * corrections[1])


def test_second_moments_of_new_entries_are_the_mean_of_their_row_at_unit_length() -> None:
    rows = chain(3)
    event, _ = grown(rows, R + 2)
    v = reference.normal(R, R, 2).double().square()
    moments = {"exp_avg": torch.zeros(R, R).double(), "exp_avg_sq": v * (1 - BETAS[1] ** STEP)}
    mapped = map_moments(event, "C1", moments, step=STEP, betas=BETAS)["exp_avg_sq"] / (1 - BETAS[1] ** STEP)
    torch.testing.assert_close(mapped[:R, :R], v)
    unit = v / rows.V.square().sum(0)
    share = fresh_share(BETAS)
    torch.testing.assert_close(mapped[:R, R:], share * unit.mean(1, keepdim=True).expand(R, 2))
    torch.testing.assert_close(mapped[R:, :R], share * v.mean(0).expand(2, R))
    torch.testing.assert_close(mapped[R:, R:], (share * unit.mean()).expand(2, 2))


@pytest.mark.parametrize("rule", ["slice", "reset"])
def test_cores_keep_a_corner_of_their_moments_or_nothing(rule) -> None:
    event, _ = frozen(chain(3), 4)
    m = reference.normal(R, R, 1)
    mapped = map_moments(event, "C1", {"exp_avg": m}, step=STEP, betas=BETAS, rule=rule)["exp_avg"]
    assert torch.equal(mapped, m[:4, :4] if rule == "slice" else torch.zeros(4, 4))


@pytest.mark.parametrize("depth", [2, *DEPTHS])
def test_gradients_of_the_squared_norm_equal_autograd(depth: int) -> None:
    rows = chain(depth)
    grams = gram_matrices({"layer": rows}, reference.alone)["layer"]
    found = product_gradients(rows, grams)
    expected = gradients(rows, lambda W: W.square().sum() / 2)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12 * float(gradient.abs().max()))
