"""Singular values by way of Grams must be those of a dense float64 SVD, however the rows are divided.

Where the Gram route loses digits it must lose no more than it says. Squares are what a Gram holds, so the error of
``sigma^2`` is ``c * R * eps * (|U| |V|)^2``: full precision at the top of a spectrum, half the digits at its foot,
unless the small directions are single columns (which are scaled first) or shared by both factors.
"""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inrank_dist.lowrank.division import sum_over_processes
from inrank_dist.lowrank.spectrum import (
    DenseRows,
    Factors,
    Grams,
    gram_matrices,
    gram_root,
    identity_rows,
    singular_values,
)

EPS = torch.finfo(torch.float64).eps
DECADES = torch.logspace(0, -8, 16, dtype=torch.float64)


def measured(U: Tensor, V: Tensor) -> Tensor:
    return singular_values(gram_matrices({"layer": Factors(U, V)}, reference.alone)["layer"])


def make(kind: str, out: int, in_: int, R: int, seed: int) -> tuple[Tensor, Tensor]:
    """Factors of one kind of difficulty; ``R <= min(out, in_)``."""
    U, V = reference.normal(out, R, seed), reference.normal(in_, R, seed + 1)
    inner = max(R // 2, 1)
    decades = torch.logspace(0, -8, R, dtype=torch.float64) if R > 1 else torch.ones(1, dtype=torch.float64)
    rotation = reference.orthonormal(R, R, seed + 2)
    return {
        "random": (U, V),
        "rank deficient": (U[:, :inner] @ reference.normal(inner, R, seed + 3), V),
        "repeated columns": (U[:, torch.arange(R) // 2], V[:, torch.arange(R) // 3]),
        "zero columns": (U * (torch.arange(R) % 2), V),
        "zero": (torch.zeros_like(U), V),
        "tiny": (U * 1e-18, V * 1e-18),
        "huge": (U * 1e18, V * 1e18),
        "tiny with zero columns": (U * 1e-18 * (torch.arange(R) % 2), V),
        "tiny and huge": (U * 1e-18, V * 1e18),
        "graded columns": (U * decades, V),
        "rotated": (U.double() * decades.sqrt() @ rotation, V.double() * decades.sqrt() @ rotation),
        "one factor rotated": (U.double() * decades @ rotation, V),
        "bf16": (U.bfloat16().float(), V.bfloat16().float()),
    }[kind]


KINDS = [
    "random", "rank deficient", "repeated columns", "zero columns", "tiny with zero columns", "zero", "tiny", "huge",
    "tiny and huge", "graded columns", "rotated", "one factor rotated", "bf16",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_equals_a_dense_svd_on_every_kind(kind: str, data: st.DataObject) -> None:
    # The one statement that must hold for anything at all, on tall, wide, square and one-mode products.
    out, in_ = data.draw(st.integers(1, 48), "out"), data.draw(st.integers(1, 48), "in")
    R = data.draw(st.sampled_from(sorted({1, min(out, in_), (min(out, in_) + 1) // 2})), "R")
    U, V = make(kind, out, in_, R, data.draw(st.integers(0, 10**6), "seed"))
    sigma, dense = measured(U, V), reference.spectrum(U, V)
    scale = torch.linalg.matrix_norm(U.double(), 2) * torch.linalg.matrix_norm(V.double(), 2)
    assert sigma.shape == (R,)
    assert sigma.dtype == torch.float64
    assert (sigma >= 0).all()
    assert (sigma.diff() <= 0).all()
    assert (sigma.square() - dense.square()).abs().max() <= 16 * R * EPS * scale.square()


@pytest.mark.parametrize("kind", ["random", "tiny", "huge", "tiny and huge", "bf16"])
@pytest.mark.parametrize(
    ("out", "in_", "R"), [(300, 80, 24), (80, 300, 24), (96, 96, 1), (256, 64, 32), (512, 512, 160)]
)
def test_is_exact_to_rounding_where_the_factors_are_well_conditioned(kind: str, out: int, in_: int, R: int) -> None:
    # Where training lives: 1e-13 of the largest value, at any scale and from factors rounded to bfloat16.
    U, V = make(kind, out, in_, R, seed=7)
    dense = reference.spectrum(U, V)
    assert (measured(U, V) - dense).abs().max() <= 1e-13 * dense[0]


@pytest.mark.parametrize(("out", "in_"), [(40, 40), (40, 200), (200, 40)])
def test_is_close_at_the_largest_possible_number_of_modes(out: int, in_: int) -> None:
    # R = min(in, out): a square factor is as badly conditioned as chance makes it.
    for seed in range(10):
        U, V = make("random", out, in_, 40, seed)
        dense = reference.spectrum(U, V)
        assert (measured(U, V) - dense).abs().max() <= 1e-10 * dense[0]


@pytest.mark.parametrize(("out", "in_"), [(200, 150), (64, 300), (16, 16)])
@pytest.mark.parametrize("where", ["U", "V", "both", "both, rotated"])
def test_keeps_every_value_of_a_spectrum_over_eight_decades(out: int, in_: int, where: str) -> None:
    # Every single value, not the largest only: the small ones are the modes that have just begun to be learned. The
    # true values are known by construction; a dense SVD of the product is itself no better than 1e-8 here.
    U, V = reference.orthonormal(out, 16, 1), reference.orthonormal(in_, 16, 2)
    rotation = reference.orthonormal(16, 16, 3)
    half = DECADES.sqrt()
    U, V = {
        "U": (U * DECADES, V),
        "V": (U, V * DECADES),
        "both": (U * half, V * half),
        "both, rotated": (U * half @ rotation, V * half @ rotation),
    }[where]
    sigma = measured(U, V)
    assert ((sigma - DECADES).abs() / DECADES).max() <= 1e-7
    assert (sigma - DECADES).abs().max() <= 1e-14


def test_states_what_it_loses_where_one_factor_alone_is_ill_conditioned() -> None:
    # U holds all eight decades and not in single columns: half the digits, 1e-7 of the largest value, and no more.
    # The rule looks at shares of a spectrum, which this cannot move; the test keeps the limit on record.
    rotation = reference.orthonormal(16, 16, 3)
    U = reference.orthonormal(200, 16, 1) * DECADES @ rotation
    V = reference.orthonormal(150, 16, 2) @ rotation
    sigma = measured(U, V)
    assert (sigma - DECADES).abs().max() <= 1e-7
    large = DECADES > 1e-4
    assert ((sigma - DECADES).abs() / DECADES)[large].max() <= 1e-7


def test_more_modes_than_rows_gives_zeros_for_the_rest() -> None:
    # No layer has them, but the update [U, U0] [V, -V0]^T of a layer near its cap does.
    U, V = reference.normal(8, 20, 0), reference.normal(40, 20, 1)
    sigma = measured(U, V)
    assert torch.allclose(sigma, reference.spectrum(U, V), rtol=0, atol=1e-13 * float(sigma[0]))
    assert (sigma[8:] <= 1e-7 * sigma[0]).all()


def test_zero_product_is_exactly_zero() -> None:
    # The first decision of a layer that has learned nothing must see zeros, not rounding.
    assert torch.equal(measured(torch.zeros(9, 4), reference.normal(7, 4, 0)), torch.zeros(4, dtype=torch.float64))
    assert torch.equal(measured(torch.zeros(9, 4), torch.zeros(7, 4)), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_root_reproduces_its_gram(kind: str) -> None:
    # Everything after the Grams is built on roots: root^T root = G column by column, root @ inverse = I.
    U, _ = make(kind, 40, 30, 12, seed=5)
    gram = gram_matrices({"layer": Factors(U, U)}, reference.alone)["layer"].U
    root = gram_root(gram)
    lengths = gram.diagonal().sqrt()
    assert ((root.root.T @ root.root - gram).abs() <= 100 * EPS * lengths * lengths[:, None]).all()
    identity = torch.eye(len(root.root), dtype=torch.float64)
    assert torch.allclose(root.root @ root.inverse, identity, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "rank"), [("random", 12), ("repeated columns", 6), ("zero columns", 6), ("zero", 0)])
def test_root_has_the_rank_of_its_gram(kind: str, rank: int) -> None:
    # Directions that do not exist must be dropped: their inverse would be rounding, magnified.
    U, _ = make(kind, 40, 30, 12, seed=5)
    root = gram_root(gram_matrices({"layer": Factors(U, U)}, reference.alone)["layer"].U)
    assert root.root.shape == (rank, 12)
    assert root.inverse.shape == (12, rank)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_row_shards_give_the_whole_grams_with_one_collective(data: st.DataObject) -> None:
    # Uneven and empty shards, several layers of different widths, dtypes and ranks: one all-reduce, the bytes that the
    # docstring promises, the same bits in every process.
    count = data.draw(st.sampled_from([1, 2, 3, 5]), "processes")
    seed = data.draw(st.integers(0, 10**6), "seed")
    layers = {}
    for index in range(data.draw(st.integers(1, 5), "layers")):
        out, in_, R = (data.draw(st.integers(1, n), name) for n, name in ((40, "out"), (40, "in"), (12, "R")))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), "dtype")
        pair = (reference.normal(n, R, seed + 2 * index + k).to(dtype) for k, n in enumerate((out, in_)))
        layers[f"layer{index}"] = Factors(*pair)
    rows = {
        name: [reference.cut(len(factor), count, seed + k) for k, factor in enumerate((layer.U, layer.V))]
        for name, layer in layers.items()
    }

    def process(index, all_reduce):
        mine = {name: Factors(x.U[rows[name][0][index]], x.V[rows[name][1][index]]) for name, x in layers.items()}
        return gram_matrices(mine, all_reduce)

    processes = reference.Processes(count)
    answers = processes.run(process)
    assert processes.calls == [8 * sum(layer.modes * (layer.modes + 1) for layer in layers.values())]
    for name, layer in layers.items():
        for factor, whole in (("U", layer.U.double()), ("V", layer.V.double())):
            expected = whole.T @ whole
            lengths = expected.diagonal().sqrt()
            first = getattr(answers[0][name], factor)
            assert ((first - expected).abs() <= 1e-14 * lengths * lengths[:, None]).all()
            assert torch.equal(first, first.T)
            assert all(torch.equal(getattr(answer[name], factor), first) for answer in answers)


def test_nothing_to_sum_calls_no_collective() -> None:
    def forbidden(tensor: Tensor) -> None:
        raise AssertionError("a collective for nothing would hang against processes that do not call it")

    assert sum_over_processes([], forbidden) == []


def test_grams_carry_no_graph_and_leave_the_factors_alone() -> None:
    # They are taken from live parameters between optimizer steps.
    U, V = (torch.nn.Parameter(reference.normal(9, 3, k)) for k in (0, 1))
    before = U.detach().clone(), V.detach().clone()
    grams = gram_matrices({"layer": Factors(U, V)}, reference.alone)["layer"]
    assert not grams.U.requires_grad
    assert torch.equal(U, before[0])
    assert torch.equal(V, before[1])


def test_a_dense_weight_is_factors_of_itself() -> None:
    W = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    parts = [DenseRows(W[:4], 0, 2), DenseRows(W[4:], 2, 5)]  # two processes
    assert torch.equal(torch.cat([part.V for part in parts]), torch.eye(5)) and parts[0].modes == 5
    grams = [gram_matrices({"W": part}, lambda total: None)["W"] for part in parts]
    sigma = singular_values(Grams(grams[0].U + grams[1].U, grams[0].V + grams[1].V))
    torch.testing.assert_close(sigma, torch.linalg.svdvals(W.double()))


@pytest.mark.parametrize(("first", "end"), [(0, 5), (1, 3), (4, 5), (2, 2), (5, 5)])
def test_rows_of_the_identity(first: int, end: int) -> None:
    assert torch.equal(identity_rows(first, end, 5, torch.device("cpu")), torch.eye(5)[first:end])
