"""The explained ratio and the rule, against the published linear scan."""

import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from inrank_dist.lowrank.criterion import RankRule, effective_rank, explained_ratio

CRITERIA: list[str] = ["energy", "variance"]


def spectrum(values: list[float]) -> Tensor:
    return torch.tensor(sorted(values, reverse=True), dtype=torch.float64)


def rule(**changes) -> RankRule:
    values = {"threshold": 0.9, "criterion": "energy", "buffer": 8, "max_rank_fraction": 1.0, "multiple_of": 1}
    return RankRule(**(values | changes))


spectra = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=24).map(spectrum)


@pytest.mark.parametrize("criterion", CRITERIA)
@settings(max_examples=150, deadline=None)
@given(sigma=spectra, structural=st.integers(0, 40))
def test_ratio_equals_the_definition(criterion: str, sigma: Tensor, structural: int) -> None:
    # Structural zeros (min(in, out) > R) belong to the variance; the energy does not see them.
    dimension = len(sigma) + structural
    whole = torch.cat([sigma, sigma.new_zeros(structural)])
    assume(whole.var(unbiased=False) > 1e-4 * whole.square().mean())
    ratio = explained_ratio(sigma, dimension, criterion)
    assert ratio.shape == (len(sigma) + 1,)
    assert ratio.dtype == torch.float64
    for q, value in enumerate(ratio.tolist()):
        assert value == pytest.approx(reference.explained(sigma, q, dimension, criterion), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("scale", [1e-36, 1e-18, 1.0, 1e18, 1e36])
def test_ratio_does_not_see_the_scale(criterion: str, scale: float) -> None:
    sigma = spectrum([5.0, 3.0, 1.0, 0.2])
    assert torch.allclose(explained_ratio(sigma * scale, 9, criterion), explained_ratio(sigma, 9, criterion))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_ratio_ends_at_exactly_one(criterion: str) -> None:
    # "All modes explain everything" must hold to the bit: a threshold of 0.999999 relies on it.
    sigma = reference.normal(30, 1, 0)[:, 0].double().abs().sort(descending=True).values
    assert float(explained_ratio(sigma, 50, criterion)[-1]) == 1.0


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("modes", [1, 4])
def test_nothing_learned_is_wholly_explained(criterion: str, modes: int) -> None:
    # 0 / 0 would make every comparison false, and the rank of an untouched layer jump to the end of its buffer.
    assert torch.equal(
        explained_ratio(torch.zeros(modes, dtype=torch.float64), 9, criterion), torch.ones(modes + 1).double()
    )


@pytest.mark.parametrize("criterion", CRITERIA)
def test_one_mode_is_explained_by_itself(criterion: str) -> None:
    assert explained_ratio(spectrum([3.0]), 7, criterion).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("size", [1, 3, 5, 7, 10, 48, 300])
@pytest.mark.parametrize("value", [0.1, 1e-17, 3e8])
def test_flat_spectrum_in_every_dimension_has_no_variance(size: int, value: float) -> None:
    # The variance is zero and what is computed for it is rounding of either sign: without a floor the answer would be
    # "explained" for some sizes and minus a million millions for others.
    sigma = torch.full((size,), value, dtype=torch.float64)
    assert torch.equal(explained_ratio(sigma, size, "variance"), torch.ones(size + 1, dtype=torch.float64))
    assert explained_ratio(sigma, size, "energy")[1] == pytest.approx(1 / size)


def test_variance_ratio_is_below_zero_for_a_flat_spectrum_that_fills_the_layer() -> None:
    # Taking a value off nine equal ones out of ten makes the rest *more* unequal. The published ratio does this too.
    ratio = explained_ratio(torch.ones(9, dtype=torch.float64), 10, "variance")
    assert ratio[1] < 0
    assert ratio[5] < ratio[1]


@settings(max_examples=150, deadline=None)
@given(sigma=spectra)
def test_energy_ratio_never_falls_and_never_passes_one(sigma: Tensor) -> None:
    # Also where a head of 1e6 stands beside a tail of 1e-6. What is left is summed, not the head taken off the total.
    ratio = explained_ratio(sigma, len(sigma), "energy")
    assert (ratio.diff() >= 0).all()
    assert (ratio <= 1).all()


states = st.fixed_dictionaries(
    {
        "multiple": st.sampled_from([1, 2, 4]),
        "rank": st.integers(1, 6),
        "buffer": st.integers(1, 5),
        "dimension": st.integers(4, 64),
        "fraction": st.sampled_from([0.1, 0.25, 0.5, 0.8, 1.0]),
        "threshold": st.floats(0.05, 0.995),
        "decay": st.floats(0.0, 2.0),
        "seed": st.integers(0, 10**6),
    }
)


@pytest.mark.parametrize("criterion", CRITERIA)
@settings(max_examples=200, deadline=None)
@given(state=states)
def test_rule_equals_the_published_scan(criterion: str, state: dict) -> None:
    multiple, dimension = state["multiple"], state["dimension"]
    rank, buffer = state["rank"] * multiple, state["buffer"] * multiple
    assume(rank <= dimension)
    decides = rule(
        threshold=state["threshold"],
        criterion=criterion,
        buffer=buffer,
        max_rank_fraction=state["fraction"],
        multiple_of=multiple,
    )
    modes, cap = decides.modes(rank, dimension), decides.cap(dimension)
    assert modes == min(rank + buffer, dimension)
    noise = reference.normal(modes, 1, state["seed"])[:, 0].double().abs() + 0.1
    sigma = (noise * torch.exp(-state["decay"] * torch.arange(modes))).sort(descending=True).values
    ratios = [reference.explained(sigma, q, dimension, criterion) for q in range(modes + 1)]
    assume(min(abs(ratio - state["threshold"]) for ratio in ratios) > 1e-9)
    decision = decides.decide(sigma, rank, dimension)

    found = reference.scan(sigma, rank, dimension, criterion, state["threshold"], modes)
    rounded = -(-found // multiple) * multiple if found > rank else rank
    assert decision.after == max(rank, min(rounded, cap))
    assert decision.before == rank <= decision.after <= rank + buffer
    assert decision.after <= max(rank, dimension)
    assert decision.after == rank or decision.after % multiple == 0
    assert decision.explained == pytest.approx(ratios[rank], rel=1e-9, abs=1e-9)
    assert decision.reached == pytest.approx(ratios[decision.after], rel=1e-9, abs=1e-9)
    if rank < decision.after < min(cap, modes) and multiple == 1:
        # The smallest q that reaches the threshold, not merely one that does.
        assert ratios[decision.after] >= state["threshold"]
        assert all(ratio < state["threshold"] for ratio in ratios[rank : decision.after])


def test_rule_does_nothing_when_the_present_rank_explains_enough() -> None:
    # Also above the cap and off the multiple: the rule never takes rank away and never rounds what it leaves alone.
    sigma = spectrum([10.0, 1.0, 0.1, 0.1, 0.1, 0.1])
    assert rule(multiple_of=4).decide(sigma, 3, 6).after == 3
    assert rule(max_rank_fraction=0.2).decide(torch.ones(6, dtype=torch.float64), 5, 6).after == 5


def test_rule_is_content_with_exactly_the_threshold() -> None:
    # Published: g(q) >= threshold. Four equal modes, half of the energy: two are enough, and two stay two.
    sigma = torch.ones(4, dtype=torch.float64)
    assert rule(threshold=0.5).decide(sigma, 1, 4).after == 2
    assert rule(threshold=0.5).decide(sigma, 2, 4).after == 2


def test_rule_does_not_move_a_layer_that_has_learned_nothing() -> None:
    assert rule().decide(torch.zeros(10, dtype=torch.float64), 2, 64).after == 2


def test_rule_takes_the_whole_buffer_at_most() -> None:
    # A flat spectrum wants everything; one decision adds b.
    assert rule(buffer=3).decide(torch.ones(5, dtype=torch.float64), 2, 64).after == 5


def test_rule_ignores_modes_beyond_the_buffer() -> None:
    # The spectrum of an update measured against the start is longer than the modes that exist.
    assert rule(buffer=3).decide(torch.ones(20, dtype=torch.float64), 2, 64).after == 5


@pytest.mark.parametrize(
    ("fraction", "dimension", "multiple", "cap"),
    [
        (0.5, 768, 1, 384),
        (0.5, 100, 16, 48),
        (0.29, 100, 1, 29),
        (0.57, 100, 1, 57),
        (361 / 1024, 1024, 1, 361),
        (1.0, 64, 1, 64),
        (0.01, 64, 1, 1),
        (0.1, 64, 8, 1),
    ],
)
def test_cap(fraction: float, dimension: int, multiple: int, cap: int) -> None:
    # 0.29 * 100 is 28.999999999999996 in binary; a person who writes 0.29 means 29.
    assert rule(max_rank_fraction=fraction, multiple_of=multiple).cap(dimension) == cap


def test_cap_means_what_a_fraction_says() -> None:
    wrong = [(c, n) for n in range(1, 300) for c in range(1, n + 1) if rule(max_rank_fraction=c / n).cap(n) != c]
    assert wrong == []


def test_modes_never_exceed_the_layer() -> None:
    # More modes than min(in, out) cannot be orthonormal, and would be parameters without rank.
    assert rule(buffer=8).modes(60, 64) == 64
    assert rule(buffer=8).modes(10, 64) == 18


def test_effective_rank() -> None:
    # Nuclear over spectral norm: the number of modes of a flat spectrum, 1 of a single mode.
    assert effective_rank(torch.ones(7, dtype=torch.float64)) == 7
    assert effective_rank(spectrum([4.0, 2.0, 1.0])) == 1.75
    assert effective_rank(spectrum([3.0, 0.0])) == 1
    assert effective_rank(torch.zeros(3, dtype=torch.float64)) == 0
    assert effective_rank(torch.zeros(0, dtype=torch.float64)) == 0


def test_first_rank_of_a_dense_layer() -> None:
    sigma = spectrum([4.0, 2.0, 1.0, 1.0, 0.0, 0.0])  # energies 16, 4, 1, 1: shares 0.727, 0.909, 0.955, 1
    found = rule(threshold=0.9, buffer=1).decide(sigma, 6, 6, may_shrink=True)
    assert (found.before, found.after, found.explained) == (6, 2, 1.0)
    assert found.reached == pytest.approx(20 / 22)
    assert rule(threshold=0.95).decide(sigma, 6, 6, may_shrink=True).after == 3
    assert rule(threshold=0.95, multiple_of=2).decide(sigma, 6, 6, may_shrink=True).after == 4
    assert rule(threshold=0.95, max_rank_fraction=0.34).decide(sigma, 6, 6, may_shrink=True).after == 2
    longer = torch.cat([sigma, sigma.new_zeros(6)])  # of W and the identity there are as many values as inputs
    assert rule(threshold=0.95).decide(longer, 6, 6, may_shrink=True).after == 3


@settings(max_examples=150, deadline=None)
@given(sigma=spectra, starts=st.tuples(st.integers(1, 24), st.integers(1, 24)), threshold=st.floats(0.05, 0.99))
def test_a_rank_that_may_shrink_does_not_depend_on_the_rank_before(
    sigma: Tensor, starts: tuple[int, int], threshold: float
) -> None:
    size = len(sigma)
    ranks = [
        rule(threshold=threshold, buffer=24).decide(sigma, min(start, size), size, may_shrink=True).after
        for start in starts
    ]
    ratio = explained_ratio(sigma, size, "energy").tolist()
    smallest = next((q for q in range(1, size + 1) if ratio[q] >= threshold), size)
    assert ranks == [smallest, smallest]


def test_a_rank_shrinks_only_where_it_may() -> None:
    sigma = spectrum([4.0, 2.0, 1.0, 1.0])  # energies 16, 4, 1, 1: shares 0.727, 0.909, 0.955, 1
    assert rule(threshold=0.9).decide(sigma, 3, 4).after == 3
    shrunk = rule(threshold=0.9).decide(sigma, 3, 4, may_shrink=True)
    assert (shrunk.before, shrunk.after) == (3, 2) and shrunk.reached == pytest.approx(20 / 22)
    assert rule(threshold=0.9, multiple_of=4).decide(sigma, 4, 4, may_shrink=True).after == 4
    assert rule(threshold=0.7).decide(sigma, 3, 4, may_shrink=True).after == 1
