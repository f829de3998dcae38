"""The null rank: what the rule answers on factors that were never trained.

The published ranks are null ranks. These tests rebuild them from the rule alone, which is both the
strongest check of the rule and the reason why the null rank exists.
"""

import json

import pytest
import reference
import torch

from inrank_dist.lowrank.criterion import RankRule
from inrank_dist.lowrank.init import generator_for, start_factors
from inrank_dist.lowrank.null import NullRanks
from inrank_dist.lowrank.spectrum import Factors

SMALL, MEDIUM, LARGE = (3072, 768), (4096, 1024), (5120, 1280)


def published(shape: tuple[int, int], threshold: float = 0.9, buffer: int = 100) -> RankRule:
    """The published settings; their cap is ``min(in, out) / 2 - b - 1``."""
    width = min(shape)
    return RankRule(
        threshold=threshold,
        criterion="variance",
        buffer=buffer,
        max_rank_fraction=(width // 2 - buffer - 1) / width,
        multiple_of=1,
    )


def kaiming(out: int, in_: int, modes: int) -> Factors:
    return start_factors(out, in_, modes, "kaiming", 1.0, generator_for(3, "born", out, in_))


def path(null: NullRanks, shape: tuple[int, int], checks: int = 40) -> list[int]:
    """Null ranks check by check until the rule stops."""
    ranks = [null.of(shape)]
    for _ in range(checks):
        null.advance({shape})
        ranks.append(null.of(shape))
        if ranks[-1] == ranks[-2]:
            return ranks
    raise AssertionError(f"the rule does not stop: {ranks}")


@pytest.mark.parametrize(
    ("shape", "rank", "tolerance"),
    [(SMALL, 255, 2), (MEDIUM, 287, 4), (LARGE, 312, 3)],
    ids=["small", "medium", "large"],
)
def test_published_ranks_are_those_of_untrained_factors(shape: tuple[int, int], rank: int, tolerance: int) -> None:
    # Published for trained GPT-2: 254, 287, 313. Nothing is trained here.
    ranks = path(NullRanks(published(shape), 2, seed=0), shape)
    assert ranks[-1] == pytest.approx(rank, abs=tolerance)
    assert ranks == sorted(ranks)
    assert len(ranks) <= 20


def test_published_rank_from_factors_as_they_are_born() -> None:
    # The published factors start uniform (kaiming), not normal: the rule does not see the difference.
    assert path(NullRanks(published(SMALL), 2, seed=0, initial=kaiming), SMALL)[-1] == pytest.approx(255, abs=2)


@pytest.mark.parametrize(
    ("shape", "threshold", "buffer", "rank"), [(SMALL, 0.8, 100, 152), (MEDIUM, 0.9, 50, 183), (MEDIUM, 0.9, 150, 361)]
)
def test_threshold_and_buffer_move_the_null_rank(
    shape: tuple[int, int], threshold: float, buffer: int, rank: int
) -> None:
    # So a rank follows from the settings of the rule, not from the data.
    null = NullRanks(published(shape, threshold, buffer), 2, seed=0)
    assert path(null, shape)[-1] == pytest.approx(rank, abs=3)


def test_start_does_not_move_the_null_rank() -> None:
    ends = [path(NullRanks(published(SMALL), start, seed=0), SMALL)[-1] for start in (2, 100)]
    assert ends[0] == pytest.approx(ends[1], abs=2)


@pytest.mark.parametrize("criterion", ["variance", "energy"])
def test_follows_the_rule_on_independent_factors(criterion: str) -> None:
    # Check by check what a dense SVD and the linear scan say of normal factors drawn elsewhere.
    shape, buffer = (300, 200), 30
    rule = RankRule(threshold=0.9, criterion=criterion, buffer=buffer, max_rank_fraction=0.6, multiple_of=1)  # type: ignore[arg-type]
    null = NullRanks(rule, 4, seed=0)
    rank = 4
    for check in range(6):
        modes = min(rank + buffer, 200)
        sigma = reference.spectrum(reference.normal(300, modes, check), reference.normal(200, modes, check + 100))
        rank = min(reference.scan(sigma, rank, 200, criterion, 0.9, modes), rule.cap(200))
        null.advance({shape})
        assert null.of(shape) == pytest.approx(rank, abs=4)


def small_rule(**changes) -> RankRule:
    values = {"threshold": 0.9, "criterion": "variance", "buffer": 12, "max_rank_fraction": 0.5, "multiple_of": 1}
    return RankRule(**(values | changes))


def test_obeys_cap_multiple_and_start_like_a_run() -> None:
    null = NullRanks(small_rule(multiple_of=4, criterion="energy", threshold=0.99), 4, seed=0)
    ranks = path(null, (100, 70))
    assert ranks[0] == 4
    assert ranks[1] == 16
    assert ranks[-1] == 32  # half of 70 is 35; 32 is the last multiple of 4


def test_transposed_shapes_share_one_null_rank() -> None:
    # The two matrices of an MLP: the product of a transposed pair has the same spectrum, so one sample serves both.
    both, tall, wide = (NullRanks(small_rule(), 2, seed=5) for _ in range(3))
    for _ in range(4):
        both.advance({(96, 48), (48, 96)})
        tall.advance({(96, 48)})
        wide.advance({(48, 96)})
        assert both.of((96, 48)) == both.of((48, 96)) == tall.of((96, 48)) == wide.of((48, 96))
    assert both.checks == 4


def test_depends_on_the_seed_and_on_nothing_else() -> None:
    # Not on the global generator, and not on which other shapes there are.
    torch.manual_seed(0)
    first, second = NullRanks(small_rule(), 2, seed=5), NullRanks(small_rule(), 2, seed=5)
    other = NullRanks(small_rule(), 2, seed=6)
    drawn = []
    for check in range(5):
        first.advance({(96, 48)})
        torch.manual_seed(check)
        second.advance({(64, 64), (96, 48), (200, 30)})
        other.advance({(96, 48)})
        assert first.of((96, 48)) == second.of((96, 48))
        drawn.append((first.of((96, 48)), other.of((96, 48))))
    assert any(a != b for a, b in drawn), "another seed gives another sample"


def test_draws_anew_at_each_check() -> None:
    # Else one unlucky sample would be applied again and again; a run's spectra are not the same at two checks either.
    ends = set()
    for checks in range(8):
        null = NullRanks(small_rule(), 2, seed=5)
        null.load_state_dict({"checks": checks, "ranks": [[96, 48, 12]]})
        null.advance({(96, 48)})
        ends.add(null.of((96, 48)))
    assert len(ends) > 1


def test_scale_of_the_born_factors_does_not_matter() -> None:
    def scaled(out: int, in_: int, modes: int) -> Factors:
        born = kaiming(out, in_, modes)
        return Factors(born.U * 1e-3, born.V * 50)

    assert path(NullRanks(small_rule(), 2, 0, kaiming), (96, 48)) == path(
        NullRanks(small_rule(), 2, 0, scaled), (96, 48)
    )


def test_born_columns_are_the_born_ones_and_only_they() -> None:
    # A start with one strong mode is explained by that mode at once: the null rank of such a run does not move,
    # although normal factors of the same shape would.
    def strong(out: int, in_: int, modes: int) -> Factors:
        scale = torch.full((modes,), 1e-3)
        scale[0] = 1.0
        return Factors(
            reference.orthonormal(out, modes, 0).float() * scale, reference.orthonormal(in_, modes, 1).float()
        )

    asked = []

    def recorded(out: int, in_: int, modes: int) -> Factors:
        asked.append((out, in_, modes))
        return strong(out, in_, modes)

    rule = small_rule(criterion="energy")
    assert path(NullRanks(rule, 2, 0, recorded), (96, 48)) == [2, 2]
    assert asked == [(96, 48, 14)]
    assert path(NullRanks(rule, 2, 0), (96, 48))[-1] > 2


def test_state_survives_json_and_continues_identically() -> None:
    # A resumed run must log the null ranks that the uninterrupted one would have logged.
    shapes = {(96, 48), (48, 96), (80, 80)}
    straight = NullRanks(small_rule(), 2, seed=1)
    for _ in range(2):
        straight.advance(shapes)
    resumed = NullRanks(small_rule(), 2, seed=1)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    assert resumed.checks == 2
    for _ in range(4):
        straight.advance(shapes)
        resumed.advance(shapes)
        assert all(straight.of(shape) == resumed.of(shape) for shape in shapes)
    assert straight.state_dict() == resumed.state_dict()


def test_before_any_check_it_is_the_initial_rank() -> None:
    assert NullRanks(small_rule(), 7, seed=0).of((96, 48)) == 7


@pytest.mark.parametrize("criterion", ["energy", "variance"])
def test_modes_that_open_at_zero_add_nothing_to_the_null(criterion: str) -> None:
    """A run whose new modes start at zero and that learns nothing keeps the spectrum it was born with."""
    rule = RankRule(threshold=0.9, criterion=criterion, buffer=6, max_rank_fraction=0.5, multiple_of=1)  # type: ignore[arg-type]
    null = NullRanks(rule, 2, 0, kaiming, opens_at_random=False)
    born = kaiming(96, 48, 8)
    rank = 2
    for _ in range(5):
        null.advance({(96, 48)})
        modes = rule.modes(rank, 48)
        U, V = (torch.nn.functional.pad(factor, (0, modes - 8)) for factor in (born.U, born.V))
        rank = rule.decide(torch.linalg.svdvals(U.double() @ V.double().T)[:modes], rank, 48).after
        assert null.of((96, 48)) == rank


def test_dense_start_is_the_rule_on_an_untrained_weight() -> None:
    rule = small_rule(criterion="energy", max_rank_fraction=1.0)
    null = NullRanks(rule, 4, seed=0)
    null.start_dense({(100, 70), (70, 100)})
    sigma = torch.linalg.svdvals(torch.randn(100, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    assert (
        null.of((100, 70))
        == null.of((70, 100))
        == pytest.approx(rule.decide(sigma, 70, 70, may_shrink=True).after, abs=2)
    )
    assert null.checks == 1
    before = null.of((100, 70))
    null.advance({(100, 70)})  # growth goes on from there
    assert null.of((100, 70)) >= before


def test_the_null_shrinks_as_the_run_does() -> None:
    null = NullRanks(small_rule(criterion="energy", max_rank_fraction=1.0), 40, seed=0)
    null.advance({(100, 70)})
    assert null.of((100, 70)) >= 40
    null.advance({(100, 70)}, may_shrink=True)
    assert null.of((100, 70)) < 40  # 0.9 of the energy of 52 untrained modes
