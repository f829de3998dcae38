"""The section ``lowrank``: what it refuses, what it means, and the calendar that follows from it."""

import dataclasses
import re

import pytest

from inrank_dist.method.policy import RankPolicy
from inrank_dist.method.settings import LowRankSettings

NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial_rank": 0}, "lowrank.initial_rank is 0; write a whole number of at least 1"),
        ({"initial_rank": -3}, "lowrank.initial_rank is -3;"),
        ({"interval": 0}, "lowrank.interval is 0;"),
        ({"warmup_steps": 0}, "lowrank.warmup_steps is 0;"),
        ({"multiple_of": 0}, "lowrank.multiple_of is 0;"),
        # Without a fading base nothing else would notice, and a freeze at step 0 or before never comes.
        ({"freeze_step": 0, "base": "none"}, "lowrank.freeze_step is 0; write a whole number of at least 1"),
        ({"freeze_step": -5, "base": "frozen"}, "lowrank.freeze_step is -5;"),
        ({"buffer": 0}, "lowrank.buffer is 0; the rank grows into the buffer"),
        ({"buffer": -1, "mode": "fixed"}, "lowrank.buffer is -1;"),
        ({"threshold": 0.0}, "lowrank.threshold is 0.0; write a ratio between 0 and 1, such as 0.9"),
        ({"threshold": 1.0}, "lowrank.threshold is 1.0;"),
        ({"threshold": 90.0}, "lowrank.threshold is 90.0;"),
        ({"threshold": NAN}, "lowrank.threshold is nan;"),
        ({"max_rank_fraction": 0.0}, "lowrank.max_rank_fraction is 0.0;"),
        ({"max_rank_fraction": 1.5}, "lowrank.max_rank_fraction is 1.5;"),
        ({"max_rank_fraction": NAN}, "lowrank.max_rank_fraction is nan;"),
        ({"frobenius_decay": -0.1}, "lowrank.frobenius_decay is -0.1; write 0 or a positive number"),
        ({"frobenius_decay": NAN}, "lowrank.frobenius_decay is nan;"),
        ({"targets": "all"}, "lowrank.targets is 'all'; write a list such as [all]"),
        ({"train_only_factors": True}, "lowrank.base is decay; write lowrank.base: frozen"),
        ({"targets": []}, "lowrank.targets is empty; write targets such as [mlp], or lowrank.mode: full"),
        ({"init": "spectral"}, "lowrank.init is spectral but with lowrank.base decay the factors start at zero;"),
        ({"dense_fraction": 1.0, "base": "none"}, "write a fraction from 0, for none, to below 1"),
        ({"dense_fraction": 0.1}, "lowrank.dense_fraction is 0.1 but lowrank.base is decay; write lowrank.base: none"),
        (
            {"dense_fraction": 0.1, "base": "none", "measure": "product", "growth_init": "published"},
            "write lowrank.growth_init: random",
        ),
        ({"activation": "silu"}, "lowrank.mode is efficient; write lowrank.mode: fixed, or lowrank.activation: none"),
        ({"activation": "silu", "mode": "fixed"}, "write lowrank.base: none, or lowrank.activation: none"),
        (
            {"activation": "silu", "mode": "fixed", "base": "none", "frobenius_decay": 0.1},
            "write lowrank.frobenius_decay: 0, or lowrank.activation: none",
        ),
        (
            {"activation": "silu", "mode": "fixed", "base": "none", "dense_fraction": 0.1},
            "write lowrank.dense_fraction: 0, or lowrank.activation: none",
        ),
        ({"init": "spectral_ones", "base": "frozen"}, "write lowrank.base: none or lowrank.init: orthogonal"),
        (
            {"initial_rank": 6, "buffer": 8, "multiple_of": 4},
            "lowrank.initial_rank is 6, not a multiple of lowrank.multiple_of 4; write 8",
        ),
        (
            {"initial_rank": 8, "buffer": 9, "multiple_of": 4},
            "lowrank.buffer is 9, not a multiple of lowrank.multiple_of 4; write 12",
        ),
        ({"depth": 1}, "lowrank.depth is 1; write 2, or more for layers with cores between U and V"),
        ({"init_scale": 0.0}, "lowrank.init_scale is 0.0; write a number above 0, such as 0.1"),
        ({"init_scale": NAN}, "lowrank.init_scale is nan;"),
        ({"outer_lr_scale": -1.0}, "lowrank.outer_lr_scale is -1.0; write 0 or a positive number, such as 1"),
        (
            {"depth": 3, "mode": "fixed", "base": "none", "activation": "silu"},
            "lowrank.depth is 3 but lowrank.activation is silu; write lowrank.activation: none, or lowrank.depth: 2",
        ),
        ({"depth": 3, "base": "none", "dense_fraction": 0.1}, "write lowrank.dense_fraction: 0, or lowrank.depth: 2"),
        ({"depth": 4, "base": "none", "init": "kaiming"}, "write lowrank.init: orthogonal, or lowrank.depth: 2"),
        (
            {"depth": 3, "base": "none", "growth_init": "published", "measure": "product"},
            "write lowrank.growth_init: random, or lowrank.depth: 2",
        ),
        ({"depth": 3, "final": "budget"}, "write lowrank.final: per_layer, or lowrank.depth: 2"),
        ({"depth": 3, "outer_init": "gradient"}, "write lowrank.mode: fixed, or lowrank.outer_init: random"),
        (
            {"depth": 3, "outer_init": "gradient", "mode": "fixed"},
            "write lowrank.base: frozen, or lowrank.outer_init: random",
        ),
        ({"depth": 3, "outer_lr_scale": 0.0}, "write lowrank.mode: fixed, or a positive lowrank.outer_lr_scale"),
        (
            {"warmup_steps": 300, "freeze_step": 200},
            "but the base fades until lowrank.warmup_steps 300; write a freeze_step of at least 300",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_that_says_what_to_write(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        LowRankSettings(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mode": "full"},
        {"mode": "full", "init": "spectral"},  # nothing is factored: no conflict
        {"mode": "fixed", "buffer": 0},
        {"mode": "fixed", "initial_rank": 6, "multiple_of": 4},  # the rank is never raised
        {"mode": "fixed", "freeze_step": 100},
        {"mode": "inrank", "freeze_step": 100},  # never freezes: warned about, not refused
        {"init": "spectral", "base": "none"},
        {"init": "kaiming", "base": "none", "measure": "product", "criterion": "variance"},
        {"base": "none", "freeze_step": 1},
        {"base": "frozen", "freeze_step": 100},
        {"warmup_steps": 200, "freeze_step": 200},
        {"initial_rank": 8, "buffer": 12, "multiple_of": 4},
        {"max_rank_fraction": 1.0},
        {"depth": 3},
        {"depth": 5, "base": "none", "init": "spectral"},
        {"depth": 3, "init": "kaiming"},  # the base only
        {"depth": 3, "mode": "fixed", "base": "frozen", "outer_init": "gradient", "outer_lr_scale": 0.0},
        {"mode": "full", "depth": 3, "activation": "silu"},
    ],
)
def test_what_works_is_taken(changes: dict) -> None:
    LowRankSettings(**changes)


def test_settings_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        LowRankSettings("full")  # type: ignore[misc]


def test_final_ranks_suit_the_device_unless_told() -> None:
    free = LowRankSettings(initial_rank=3, buffer=5)
    assert free.rule.multiple_of == 1, "growth is not rounded"
    assert (free.final_multiple("cuda"), free.final_multiple("cpu")) == (64, 8)
    told = LowRankSettings(initial_rank=4, buffer=4, multiple_of=4)
    assert (told.rule.multiple_of, told.final_multiple("cuda"), told.final_multiple("cpu")) == (4, 4, 4)


def test_rule_follows_the_settings() -> None:
    settings = LowRankSettings(
        threshold=0.8, criterion="variance", buffer=12, max_rank_fraction=0.25, multiple_of=4, initial_rank=4
    )
    rule = settings.rule
    assert (rule.threshold, rule.criterion, rule.buffer) == (0.8, "variance", 12)
    assert (rule.max_rank_fraction, rule.multiple_of) == (0.25, 4)
    # A rank that never grows has no use for a buffer: R = r.
    assert LowRankSettings(mode="fixed", buffer=12).rule.modes(8, 64) == 8


@pytest.mark.parametrize(
    ("changes", "policy"),
    [
        ({"mode": "full"}, RankPolicy(None, None, None)),
        ({"mode": "fixed"}, RankPolicy(None, None, 200)),
        ({"mode": "fixed", "base": "frozen"}, RankPolicy(None, None, None)),
        ({"mode": "inrank", "base": "frozen", "freeze_step": 90}, RankPolicy(25, None, None)),
        ({"mode": "inrank", "interval": 7}, RankPolicy(7, None, 200)),
        ({"mode": "efficient"}, RankPolicy(25, 200, 200)),
        ({"mode": "efficient", "freeze_step": 300}, RankPolicy(25, 300, 200)),
        ({"mode": "efficient", "base": "none", "freeze_step": 90}, RankPolicy(25, 90, None)),
        ({"mode": "efficient", "base": "none", "warmup_steps": 60}, RankPolicy(25, 60, None)),
        ({"mode": "full", "base": "none", "dense_fraction": 0.05}, RankPolicy(None, None, None)),
        ({"mode": "fixed", "base": "none", "dense_fraction": 0.05}, RankPolicy(None, None, None, dense_steps=50)),
        ({"mode": "efficient", "base": "none", "dense_fraction": 0.05}, RankPolicy(25, 50, None, dense_steps=50)),
        (
            {"mode": "efficient", "base": "none", "dense_fraction": 0.05, "freeze_step": 90},
            RankPolicy(25, 90, None, dense_steps=50),
        ),
    ],
)
def test_calendar_follows_the_settings(changes: dict, policy: RankPolicy) -> None:
    assert LowRankSettings(**changes).policy(1000) == policy


UNUSED = {"freeze_patience", "freeze_fraction", "final_budget"}
ALWAYS = {
    "factorized_lr_scale", "frobenius_in_loss", "track_updates", "init_scale", "outer_init", "outer_lr_scale",
    "stable_rank_tolerance", "stable_rank_window", "track_weights",
}  # fmt: skip
FREEZING = UNUSED | {"freeze_step", "final"}


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        ({"mode": "efficient"}, {"measure", *UNUSED}),
        ({"mode": "efficient", "base": "none"}, UNUSED),
        ({"mode": "efficient", "base": "none", "freeze_step": "auto"}, {"warmup_steps", "final_budget"}),
        ({"mode": "efficient", "base": "none", "final": "budget"}, UNUSED - {"final_budget"}),
        ({"mode": "efficient", "base": "none", "freeze_step": 90}, {"warmup_steps", *UNUSED}),
        ({"mode": "efficient", "base": "frozen"}, {"measure", *UNUSED}),
        ({"mode": "inrank"}, {*FREEZING, "measure"}),
        ({"mode": "inrank", "base": "frozen"}, {*FREEZING, "measure", "warmup_steps"}),
        ({"mode": "inrank", "base": "none"}, {*FREEZING, "warmup_steps"}),
    ],
)
def test_settings_without_effect_are_named(changes: dict, idle: set[str]) -> None:
    reasons = LowRankSettings(**changes).without_effect()
    assert {key for key, _ in reasons} == idle | ALWAYS
    assert len(reasons) == len(idle) + len(ALWAYS)
    assert all(reason for _, reason in reasons)


def test_settings_without_effect_in_mode_fixed() -> None:
    growth = {
        "buffer", "threshold", "criterion", "measure", "interval", "max_rank_fraction", "multiple_of", "growth_init",
    } | FREEZING | ALWAYS  # fmt: skip
    assert {key for key, _ in LowRankSettings(mode="fixed").without_effect()} == growth
    still = LowRankSettings(mode="fixed", base="none").without_effect()
    assert {key for key, _ in still} == growth | {"warmup_steps"}
    assert len(still) == len(growth) + 1


def test_settings_of_deep_layers_have_an_effect_only_there() -> None:
    deep = {"init_scale", "outer_init", "outer_lr_scale", "measure"}
    assert not deep & {key for key, _ in LowRankSettings(depth=3).without_effect()}
    assert {key for key, _ in LowRankSettings(depth=3, base="none").without_effect()} & deep == {"init_scale"}


def test_nothing_has_an_effect_in_mode_full() -> None:
    every = {key for key, _ in LowRankSettings(mode="full").without_effect()}
    assert every == {field.name for field in dataclasses.fields(LowRankSettings)} - {"mode"}


def test_calendar_of_a_run() -> None:
    # Step 0 is the start, no decision; the freeze takes the place of the growth due with it and stays due until it is
    # done (a run whose steps were cut may resume behind it).
    policy = RankPolicy(interval=25, freeze_step=100, decay_steps=None)
    due = {step: policy.action(step) for step in range(101) if policy.action(step)}
    assert due == {25: "grow", 50: "grow", 75: "grow", 100: "freeze"}


def test_calendar_whose_freeze_falls_between_two_decisions() -> None:
    policy = RankPolicy(interval=30, freeze_step=70, decay_steps=None)
    assert {step: policy.action(step) for step in range(71) if policy.action(step)} == {
        30: "grow",
        60: "grow",
        70: "freeze",
    }


def test_calendar_without_freeze_goes_on() -> None:
    policy = RankPolicy(interval=10, freeze_step=None, decay_steps=None)
    assert [step for step in range(41) if policy.action(step) == "grow"] == [10, 20, 30, 40]


def test_calendar_of_a_fixed_rank_is_empty() -> None:
    policy = RankPolicy(interval=None, freeze_step=None, decay_steps=40)
    assert not any(policy.action(step) for step in range(100))


def test_base_fades_linearly_and_is_gone_where_it_is_zero() -> None:
    # Removing it then changes no output: the last forward pass with it had a > 0, the next has none.
    policy = RankPolicy(interval=10, freeze_step=40, decay_steps=8)
    assert [policy.base_scale(step) for step in range(9)] == [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]
    assert policy.base_scale(1000) == 0
    assert all(policy.removes_base(step) == (policy.base_scale(step) == 0) for step in range(50))


def test_base_that_does_not_fade_stays() -> None:
    policy = RankPolicy(interval=10, freeze_step=40, decay_steps=None)
    assert all(policy.base_scale(step) == 1 and not policy.removes_base(step) for step in range(100))


def test_patience_ends_growth_once_the_base_is_gone() -> None:
    policy = RankPolicy(interval=10, freeze_step=100, decay_steps=50, patience=2)
    assert policy.action(30, checks_without_growth=5) == "grow"  # the base still carries weight
    assert policy.action(60, checks_without_growth=1) == "grow"
    assert policy.action(60, checks_without_growth=2) == "freeze"
    assert policy.action(61, checks_without_growth=2) is None
    assert policy.action(100, checks_without_growth=0) == "freeze"


def test_dense_layers_are_factorised_once_and_grow_after_that() -> None:
    policy = RankPolicy(10, 40, None, dense_steps=15)
    actions = {step: action for step in range(41) if (action := policy.action(step, dense=step <= 15))}
    assert actions == {15: "factorise", 20: "grow", 30: "grow", 40: "freeze"}
    assert [RankPolicy(None, None, None, dense_steps=2).action(step, dense=step <= 2) for step in range(4)] == [
        None, None, "factorise", None,
    ]  # fmt: skip
    assert policy.action(18, dense=True) == "factorise", "fewer dense steps than when the checkpoint was written"
    assert policy.action(10, dense=False) == "grow", "more of them"
    assert RankPolicy(10, 15, None, dense_steps=15).action(15) == "freeze"


def test_auto_freezes_at_the_fraction_at_the_latest_and_never_in_the_fade() -> None:
    settings = {"mode": "efficient", "freeze_step": "auto", "freeze_fraction": 0.3, "freeze_patience": 4}
    assert LowRankSettings(**settings, base="none").policy(1000) == RankPolicy(25, 300, None, 4)
    assert LowRankSettings(**settings, warmup_steps=400).policy(1000) == RankPolicy(25, 400, 400, 4)


@pytest.mark.parametrize(
    ("settings", "rank", "found", "reached", "says"),
    [
        ({}, 8, 13, 0.95, None),
        ({}, 8, 13, 0.85, "lowrank.multiple_of null (64 on GPUs, 8 on CPUs)"),
        ({"multiple_of": 4}, 8, 13, 0.85, "lowrank.multiple_of 4"),
        ({"final": "uniform"}, 8, 13, 0.85, "lowrank.final uniform"),
        ({"final": "budget", "final_budget": 0.33}, 8, 13, 0.85, "lowrank.final_budget 0.33"),
        ({}, 16, 16, 0.85, "lowrank.max_rank_fraction 0.5"),
        ({}, 13, 13, 0.85, None),
    ],
)
def test_what_keeps_a_rank_below_the_threshold(
    settings: dict[str, object], rank: int, found: int, reached: float, says: str | None
) -> None:
    assert LowRankSettings(**settings).limit(32, rank, found, reached) == says
