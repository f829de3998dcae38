"""Rank events: growth changes nothing, the freeze loses exactly what it says, and shards never matter."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inrank_dist.lowrank.division import ALONE, Processes
from inrank_dist.lowrank.event import RankEvent, freeze, freeze_all, grow, map_factors, orthogonalise
from inrank_dist.lowrank.spectrum import Factors, Spectra, measure_spectra


def directions(rows: int, count: int, seed: int = 99) -> Tensor:
    """The random ``Z`` of a layer, float32 as in a run."""
    return reference.normal(rows, count, seed)


def apply(U: Tensor, V: Tensor, plan, Z: Tensor | None = None) -> tuple[RankEvent, Factors]:
    """One event in one process; ``plan(grams)`` makes it."""
    factors = {"layer": Factors(U, V)}
    spectra = measure_spectra(factors, ALONE)
    event = plan(spectra.grams["layer"])
    if event.fresh:
        Z = directions(len(V), event.fresh) if Z is None else Z
        event = orthogonalise({"layer": event}, factors, spectra, {"layer": Z}, ALONE)["layer"]
    return event, map_factors(event, U, V, Z if event.fresh else None)


def product_in_order(U: Tensor, V: Tensor) -> Tensor:
    """``U @ V.T`` summed mode by mode, so that equal terms give equal bits (a BLAS orders its sums by size)."""
    total = torch.zeros(len(U), len(V), dtype=U.dtype)
    for u, v in zip(U.T, V.T, strict=True):
        total += torch.outer(u, v)
    return total


def spectral_norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


GROWTHS = {
    "random": lambda n, R: reference.normal(n, R, 0),
    "orthonormal": lambda n, R: reference.orthonormal(n, R, 0).float(),
    "repeated columns": lambda n, R: reference.normal(n, R, 0)[:, torch.arange(R) // 2],
    "zero columns": lambda n, R: reference.normal(n, R, 0) * (torch.arange(R) % 2),
    "zero": lambda n, R: torch.zeros(n, R),
    "low rank, rounded": lambda n, R: reference.normal(n, 2, 0) @ reference.normal(2, R, 1),
    "tiny": lambda n, R: reference.normal(n, R, 0) * 1e-18,
    "huge": lambda n, R: reference.normal(n, R, 0) * 1e18,
    "graded columns": lambda n, R: reference.normal(n, R, 0) * torch.logspace(0, -8, R),
}


@pytest.mark.parametrize("kind", GROWTHS)
@pytest.mark.parametrize(("out", "in_", "R", "F"), [(50, 40, 6, 5), (30, 16, 6, 10), (16, 16, 1, 15), (64, 200, 20, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_growth_keeps_every_bit_and_opens_orthonormal_directions(
    kind: str, out: int, in_: int, R: int, F: int, dtype: torch.dtype
) -> None:
    # Two of the shapes end with R + F = in: the fresh directions are then all that is left.
    U, V = reference.normal(out, R, 7).to(dtype), GROWTHS[kind](in_, R).to(dtype)
    event, new = apply(U, V, lambda grams: grow(R, R + F))
    assert event.modes == new.modes == R + F
    assert new.U.dtype == new.V.dtype == dtype
    assert torch.equal(new.U[:, :R], U)
    assert torch.equal(new.V[:, :R], V)
    assert torch.equal(new.U[:, R:], torch.zeros(out, F, dtype=dtype))
    assert torch.equal(product_in_order(new.U, new.V), product_in_order(U, V))

    # A column of rounding has no direction of its own to be orthogonal to: half the digits, whatever the dtype.
    exact = dtype == torch.float64 and kind != "low rank, rounded"
    fresh, tolerance = new.V[:, R:].double(), 1e-8 if exact else 1e-6
    assert torch.allclose(fresh.T @ fresh, torch.eye(F).double(), rtol=0, atol=tolerance)
    lengths = V.double().norm(dim=0)
    assert ((V.double().T @ fresh).abs() <= tolerance * lengths.max()).all()
    if kind != "low rank, rounded":
        assert ((V.double().T @ fresh).abs() <= tolerance * lengths[:, None]).all()


def test_growth_without_room_for_bias_spans_what_a_dense_qr_spans() -> None:
    # The fresh columns are Z with V projected out, and nothing else: the same subspace as a QR of [V, Z].
    V, Z = reference.normal(40, 6, 0), directions(40, 5)
    _, new = apply(reference.normal(50, 6, 1), V, lambda grams: grow(6, 11), Z)
    q = torch.linalg.qr(torch.cat([V, Z], dim=1).double())[0][:, 6:]
    fresh = new.V[:, 6:].double()
    assert torch.allclose(fresh @ fresh.T, q @ q.T, rtol=0, atol=1e-6)


def test_growth_of_a_layer_without_any_mode_yet_has_a_gradient() -> None:
    # Fresh modes must be able to learn: dL/dU' = G @ V' is not zero although U' is.
    _, new = apply(torch.zeros(20, 2), reference.normal(15, 2, 0), lambda grams: grow(2, 5))
    target = reference.normal(20, 15, 3).double()
    gradient_U, gradient_V = reference.gradients(new.U, new.V, lambda W: (W * target).sum())
    assert (gradient_U.norm(dim=0) > 0.1).all()
    assert torch.equal(gradient_V, torch.zeros_like(gradient_V))


def graded(out: int, in_: int, R: int, seed: int, floor: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Unbalanced float64 factors of a product with clear gaps in its spectrum."""
    sigma = torch.logspace(0, torch.tensor(floor).log10(), R, dtype=torch.float64)
    mix = reference.orthonormal(R, R, seed + 2) * torch.linspace(0.5, 5, R, dtype=torch.float64)
    U = reference.orthonormal(out, R, seed) * sigma @ mix
    return U, reference.orthonormal(in_, R, seed + 1) @ torch.linalg.inv(mix).T


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("out", "in_", "R"), [(60, 40, 12), (40, 60, 12), (12, 12, 12), (30, 20, 1), (400, 200, 100)])
def test_freeze_is_the_best_approximation_in_balanced_factors(
    dtype: torch.dtype, tolerance: float, out: int, in_: int, R: int
) -> None:
    U, V = (factor.to(dtype) for factor in graded(out, in_, R, seed=R))
    W, sigma = reference.product(U, V), reference.spectrum(U, V)
    for rank in sorted({1, (R + 1) // 2, R}):
        event, new = apply(U, V, lambda grams, rank=rank: freeze(grams, rank))
        assert event.fresh == 0
        assert new.U.shape == (out, rank)
        assert new.V.shape == (in_, rank)
        change = W - reference.product(new.U, new.V)
        best = reference.product(*reference.frozen(U, V, rank))
        scale = float(sigma[0])
        # Equal to the dense SVD, and what is lost is exactly the discarded part of the spectrum.
        assert spectral_norm(best - reference.product(new.U, new.V)) <= tolerance * scale
        assert float(change.norm()) == pytest.approx(float(sigma[rank:].square().sum().sqrt()), abs=tolerance * scale)
        next_value = float(sigma[rank]) if rank < R else 0.0
        assert spectral_norm(change) == pytest.approx(next_value, abs=tolerance * scale)
        # Balanced: both Grams are the diagonal matrix of the singular values.
        for factor in (new.U.double(), new.V.double()):
            assert spectral_norm(factor.T @ factor - torch.diag(sigma[:rank])) <= tolerance * scale


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 40),
    in_=st.integers(1, 40),
    share=st.floats(0, 1),
    keep=st.floats(0, 1),
    scale=st.sampled_from([1e-18, 1.0, 1e18]),
    seed=st.integers(0, 10**6),
)
def test_freeze_loses_exactly_the_discarded_values(
    out: int, in_: int, share: float, keep: float, scale: float, seed: int
) -> None:
    # Ties and small gaps included: the approximation is then not unique, but what it loses is.
    R = max(1, round(share * min(out, in_)))
    rank = max(1, round(keep * R))
    U, V = reference.normal(out, R, seed).double() * scale, reference.normal(in_, R, seed + 1).double()
    sigma = reference.spectrum(U, V)
    event, new = apply(U, V, lambda grams: freeze(grams, rank))
    change = reference.product(U, V) - reference.product(new.U, new.V)
    assert event.modes == rank
    assert float(change.norm()) == pytest.approx(
        float(sigma[rank:].square().sum().sqrt()), abs=1e-8 * float(sigma[0]), rel=1e-8
    )


def test_freeze_of_a_frozen_layer_changes_nothing() -> None:
    U, V = graded(30, 20, 6, seed=0)
    _, once = apply(U, V, lambda grams: freeze(grams, 4))
    _, twice = apply(once.U, once.V, lambda grams: freeze(grams, 4))
    assert torch.allclose(reference.product(once.U, once.V), reference.product(twice.U, twice.V), rtol=0, atol=1e-12)


def deficient(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Factors with 8 modes, and how many modes their product has."""
    U, V = reference.normal(30, 8, 0).to(dtype), reference.normal(20, 8, 1).to(dtype)
    halves = (torch.arange(8) < 4).to(dtype)
    rotation = reference.orthonormal(8, 8, 2).to(dtype)
    return {
        "grown, not yet trained": (U * (torch.arange(8) < 3), V, 3),
        "repeated columns": (U[:, [0, 0, 1, 1, 2, 2, 2, 2]], V, 3),
        "repeated in both": (U[:, [0, 0, 0, 0, 1, 1, 1, 1]], V[:, [0, 0, 0, 0, 1, 1, 1, 1]], 2),
        "U zero": (U * 0, V, 0),
        "V zero": (U, V * 0, 0),
        "both zero": (U * 0, V * 0, 0),
        "columns that never meet": (U * halves, V * (1 - halves), 0),
        "columns that never meet, rotated": (U * halves @ rotation, V * (1 - halves) @ rotation, 0),
        "tiny and deficient": (U * 1e-18 * (torch.arange(8) < 3), V, 3),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.float32) for kind in (
            "grown, not yet trained", "repeated columns", "repeated in both", "U zero", "V zero", "both zero",
            "columns that never meet", "tiny and deficient",
        )),
        ("columns that never meet, rotated", torch.float64),
        ("repeated columns", torch.float64),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rank", [1, 3, 6, 8])
def test_freeze_of_a_deficient_product_has_no_dead_modes(kind: str, dtype: torch.dtype, rank: int) -> None:
    # A mode with both columns zero never receives a gradient again. Missing modes must be fresh ones: U zero, V not.
    U, V, true_rank = deficient(kind, dtype)
    W, sigma = reference.product(U, V), reference.spectrum(U, V)
    event, new = apply(U, V, lambda grams: freeze(grams, rank))
    kept = min(rank, true_rank)
    assert event.modes == new.modes == rank
    assert event.fresh == rank - kept
    assert torch.equal(new.U[:, kept:], torch.zeros(30, rank - kept, dtype=dtype))
    fresh = new.V[:, kept:].double()
    assert torch.allclose(fresh.T @ fresh, torch.eye(rank - kept).double(), rtol=0, atol=1e-6)
    lengths = new.V[:, :kept].double().norm(dim=0)
    assert ((new.V[:, :kept].double().T @ fresh).abs() <= 1e-6 * lengths[:, None]).all()
    assert (new.V.norm(dim=0) > 0).all()
    terms = float((U.double().norm(dim=0) * V.double().norm(dim=0)).sum())
    lost = float((W - reference.product(new.U, new.V)).norm())
    assert lost == pytest.approx(float(sigma[rank:].norm()), abs=(1e-6 if dtype == torch.float32 else 1e-12) * terms)


def layers_of_many_shapes(seed: int) -> dict[str, Factors]:
    shapes = [(40, 30, 6), (7, 50, 3), (23, 5, 5), (64, 64, 10), (3, 3, 1)]
    return {
        f"layer{index}": Factors(
            reference.normal(out, R, seed + index).double(), reference.normal(in_, R, seed + 10 + index).double()
        )
        for index, (out, in_, R) in enumerate(shapes)
    }


# What becomes of each: the number of modes, and whether by growth (to R + F = in for the last) or by freeze.
PLAN = {
    "layer0": ("grow", 10),
    "layer1": ("freeze", 2),
    "layer2": ("freeze", 3),
    "layer3": ("freeze", 5),
    "layer4": ("grow", 3),
}


FROZEN = {name: modes if action == "freeze" else 1 for name, (action, modes) in PLAN.items()}


def plan(spectra: Spectra, processes: Processes) -> dict[str, RankEvent]:
    frozen = freeze_all(spectra, FROZEN, processes)
    return {
        name: grow(len(spectra.sigma[name]), modes) if action == "grow" else frozen[name]
        for name, (action, modes) in PLAN.items()
    }


@pytest.mark.parametrize("count", [2, 3, 5, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_shards_give_the_unsharded_result(count: int, seed: int) -> None:
    # Uneven and empty shards; more processes than some layers have rows. One layer is deficient, so that a freeze too
    # opens fresh modes. Growth must agree entry by entry, a freeze up to the signs of singular vectors.
    whole = layers_of_many_shapes(seed)
    whole["layer1"] = Factors(whole["layer1"].U * torch.tensor([1.0, 0.0, 0.0]), whole["layer1"].V)
    Z = {name: directions(len(layer.V), 4, seed) for name, layer in whole.items()}
    rows = {
        name: [reference.cut(len(factor), count, seed + k) for k, factor in enumerate((layer.U, layer.V))]
        for name, layer in whole.items()
    }

    def events(factors, processes, part):
        spectra = measure_spectra(factors, processes)
        planned = plan(spectra, processes)
        fresh = {name: part(Z[name][:, : event.fresh], name) for name, event in planned.items() if event.fresh}
        completed = orthogonalise(planned, factors, spectra, fresh, processes)
        mapped = {
            name: map_factors(event, factors[name].U, factors[name].V, fresh.get(name))
            for name, event in completed.items()
        }
        return completed, mapped

    expected_events, expected = events(whole, ALONE, lambda tensor, name: tensor)
    processes = reference.Processes(count)

    def process(index, all_reduce):
        mine = {
            name: Factors(layer.U[rows[name][0][index]], layer.V[rows[name][1][index]]) for name, layer in whole.items()
        }
        return events(mine, Processes(index, count, all_reduce), lambda tensor, name: tensor[rows[name][1][index]])

    answers = processes.run(process)
    fresh = {name: event for name, event in expected_events.items() if event.fresh}
    fresh_bytes = 8 * sum(whole[name].modes * event.fresh + event.fresh**2 for name, event in fresh.items())
    answer_bytes = fresh_bytes + 8 * sum(event.M.shape[1] for event in fresh.values())
    gram_bytes = 8 * sum(layer.modes * (layer.modes + 1) for layer in whole.values())
    sigma_bytes = 8 * sum(layer.modes for layer in whole.values())
    frozen_bytes = 8 * sum(1 + 2 * layer.modes * FROZEN[name] for name, layer in whole.items())
    assert processes.calls == [gram_bytes, sigma_bytes, frozen_bytes, fresh_bytes, answer_bytes]
    assert {name for name, event in expected_events.items() if event.fresh} == {"layer0", "layer1", "layer4"}
    for name, layer in expected.items():
        U, V = (torch.cat([getattr(mapped[name], factor) for _, mapped in answers]) for factor in "UV")
        assert torch.allclose(reference.product(U, V), reference.product(layer.U, layer.V), rtol=0, atol=1e-11)
        signs = (V * layer.V).sum(0).sign()  # of singular and of fresh directions; each is one process's choice
        assert torch.allclose(V * signs, layer.V, rtol=0, atol=1e-9)
        assert torch.allclose(U * signs, layer.U, rtol=0, atol=1e-9)
        # The maps themselves are the same bits in every process; otherwise shards of one layer would not fit together.
        first = answers[0][0][name]
        for completed, _ in answers:
            for key in ("N", "M", "from_old", "from_new"):
                mine, others = getattr(completed[name], key), getattr(first, key)
                assert (mine is None and others is None) or torch.equal(mine, others)


def test_no_fresh_modes_call_no_collective() -> None:
    def forbidden(tensor: Tensor) -> None:
        raise AssertionError("nothing is fresh, nothing may travel")

    U, V = graded(20, 10, 4, seed=0)
    factors = {"layer": Factors(U, V)}
    spectra = measure_spectra(factors, ALONE)
    planned = {"layer": freeze(spectra.grams["layer"], 2)}
    assert orthogonalise(planned, factors, spectra, {}, Processes(0, 1, forbidden)) == planned


def test_an_event_leaves_the_old_factors_alone() -> None:
    # The engine still holds them until the new model stands; growth must not hand out views of them either.
    U, V = reference.normal(20, 4, 0), reference.normal(15, 4, 1)
    before = U.clone(), V.clone()
    _, new = apply(U, V, lambda grams: grow(4, 6))
    new.U.add_(1)
    new.V.add_(1)
    assert torch.equal(U, before[0])
    assert torch.equal(V, before[1])


def test_a_life_of_events_keeps_the_function() -> None:
    # Train, grow, train, grow, freeze, with float32 factors: the product moves only when trained or cut.
    U, V = torch.zeros(48, 4), reference.orthonormal(32, 4, 0).float()
    for check, modes in enumerate((9, 16, 16)):
        U = U + 0.1 * reference.normal(48, U.shape[1], check)
        V = V + 0.1 * reference.normal(32, V.shape[1], check + 50)
        W = reference.product(U, V)
        _, new = apply(
            U, V, lambda grams, modes=modes: grow(grams.U.shape[0], modes), directions(32, modes - U.shape[1])
        )
        assert torch.allclose(reference.product(new.U, new.V), W, rtol=0, atol=1e-15)
        U, V = new.U, new.V
    W, sigma = reference.product(U, V), reference.spectrum(U, V)
    _, new = apply(U, V, lambda grams: freeze(grams, 7))
    lost = float((reference.product(new.U, new.V) - W).norm())
    assert lost == pytest.approx(float(sigma[7:].norm()), rel=1e-5)
