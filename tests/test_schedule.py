"""Learning rates: where they start, peak and end."""

import pytest

from inrank_dist.train.schedule import learning_rate
from inrank_dist.train.settings import ScheduleSettings

NAMES = ["cosine", "linear", "wsd", "constant"]


def rates(name: str, **settings: object) -> list[float]:
    schedule = ScheduleSettings(name=name, **settings)  # type: ignore[arg-type]
    return [learning_rate(schedule, 2.0, step, 100) for step in range(101)]


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_is_linear_and_reaches_the_peak(name: str) -> None:
    assert rates(name, warmup_steps=10)[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_decay_ends_at_the_floor_after_the_last_step(name: str) -> None:
    got = rates(name, warmup_steps=10, min_lr_ratio=0.1)
    assert got[10] == pytest.approx(2.0)
    assert got[100] == pytest.approx(0.2)
    assert got[10:] == sorted(got[10:], reverse=True)


def test_halfway_values() -> None:
    assert rates("cosine")[50] == pytest.approx(1.0)
    assert rates("cosine")[25] == pytest.approx(1 + 2**-0.5)
    assert rates("linear")[25] == pytest.approx(1.5)
    assert rates("constant")[99] == 2.0


def test_wsd_is_stable_until_its_last_part() -> None:
    got = rates("wsd", decay_fraction=0.2)
    assert got[:81] == [2.0] * 81
    assert got[90] == pytest.approx(1.0)
