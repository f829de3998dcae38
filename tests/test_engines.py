"""Engines differ in how they hold weights, never in results."""

from pathlib import Path

import pytest
from pool import Pool
from runs import assert_same_run, short_config, small_config, train, trained_once
from sharing import nightly, slow

from inrank_dist.runtime.errors import UserError

GATHERED_EACH_TIME = "{zero_optimization: {stage3_param_persistence_threshold: 0}}"
"""ZeRO-3 as with large layers; it would keep small ones gathered."""

LAYOUTS = [
    ("local", 1, None), ("ddp", 1, None), ("ddp", 2, None), ("ddp", 4, None),
    ("fsdp", 1, None), ("fsdp", 2, None), ("fsdp", 4, None), ("fsdp", 4, 2), ("fsdp", 2, 1),
]  # fmt: skip
"""Engine, processes, processes of a shard."""

ZERO = [(f"zero{stage}", world_size, None) for stage in range(4) for world_size in (1, 2, 4)]


def with_accumulation() -> list[object]:
    """Each engine with each number of processes once, and with and without accumulation; the full product nightly."""
    cases: list[object] = []
    for index, layout in enumerate((*LAYOUTS, *ZERO)):
        # Every second one accumulates; the rows of ZERO are three long, so that each stage has both.
        now, later = (1, 2) if index % 2 else (2, 1)
        of_zero, alone = layout in ZERO, layout[1] == 1
        at_night = of_zero and (alone or layout[1] == 4)
        cases.append(nightly(*layout, now) if at_night else slow(*layout, now) if of_zero else (*layout, now))
        cases.append(nightly(*layout, later))
    return cases


@pytest.mark.parametrize(("engine", "world_size", "shard_size", "accumulation"), with_accumulation())
def test_every_engine_gives_the_same_run(
    pool: Pool, corpus: Path, engine: str, world_size: int, shard_size: int | None, accumulation: int
) -> None:
    config = short_config(
        corpus,
        parallel__engine=engine,
        parallel__shard_size=shard_size,
        train__micro_batch_size=8 // world_size // accumulation,
    )
    reference = trained_once(config)
    assert [record["action"] for record in reference.of_kind("rank_event")] == ["grow", "grow", "freeze"]
    result = pool.run("runs:train_in_worker", config, world_size=world_size)
    assert_same_run(result, reference, world_size)


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_thirty_steps_are_the_same_run(pool: Pool, corpus: Path, engine: str) -> None:
    """Differences of rounding add up over a longer run."""
    config = small_config(corpus, parallel__engine=engine)
    result = pool.run("runs:train_in_worker", config, world_size=4)
    assert_same_run(result, trained_once(config), 4)


@pytest.mark.parametrize("engine", ["fsdp", slow("zero1"), nightly("zero2"), slow("zero3")])
def test_more_processes_than_rows_and_nothing_divides(pool: Pool, corpus: Path, engine: str) -> None:
    """Widths 20 and 7 over 3 processes, vocabulary 301, rank 1: uneven shards, fewer ranks than processes."""
    config = short_config(
        corpus,
        model__name="llama",
        model__hidden_size=20,
        model__num_kv_heads=1,
        model__intermediate_size=7,
        lowrank__initial_rank=1,
        lowrank__buffer=2,
        lowrank__targets="[mlp]",
        train__global_batch_size=6,
    )
    reference = trained_once(config)
    config.parallel.engine = engine
    for world_size in (2, 3):
        config.train.micro_batch_size = 6 // world_size
        result = pool.run("runs:train_in_worker", config, world_size=world_size)
        assert_same_run(result, reference, world_size)


@pytest.mark.parametrize(
    ("engine", "world_size"),
    [("local", 1), ("ddp", 2), ("fsdp", 2), slow("zero0", 2), slow("zero1", 2), slow("zero2", 2), slow("zero3", 2)],
)
def test_growth_changes_no_logit_and_the_freeze_only_what_it_discards(
    pool: Pool, corpus: Path, engine: str, world_size: int
) -> None:
    config = short_config(corpus, parallel__engine=engine)
    for actions in pool.run("checks:growth_and_freeze", config, world_size=world_size):
        assert actions == ["grow", "grow", "freeze"]


@pytest.mark.parametrize(
    ("engine", "world_size"),
    [
        ("local", 1), ("ddp", 2), nightly("fsdp", 2), ("fsdp", 3),
        slow("zero0", 2), slow("zero1", 2), nightly("zero2", 2), ("zero3", 2), slow("zero2", 3), nightly("zero3", 3),
    ],
)  # fmt: skip
def test_every_parameter_moves_after_every_event(pool: Pool, corpus: Path, engine: str, world_size: int) -> None:
    """A stale parameter in the optimizer or in FSDP2 is silent: the loss goes on falling without it."""
    batch = {"train__global_batch_size": 6, "train__micro_batch_size": 6 // world_size}
    config = short_config(corpus, parallel__engine=engine, train__steps=10, **batch)
    assert pool.run("checks:every_parameter_moves", config, world_size=world_size) == [3] * world_size


@pytest.mark.parametrize("engine", ["ddp", "fsdp", slow("zero2"), slow("zero3")])
def test_processes_that_see_different_spectra_stop(pool: Pool, corpus: Path, engine: str) -> None:
    """Diverging ranks would be silent; instead every process names the layer."""
    config = small_config(corpus, parallel__engine=engine)
    for message in pool.run("checks:disagreement", config, 1, world_size=2):
        assert message == "processes disagree on the ranks of: blocks.1.mlp.up"


@pytest.mark.parametrize(
    ("engine", "world_size"),
    [
        ("local", 1),
        slow("ddp", 2),
        ("fsdp", 3),
        nightly("zero0", 2),
        nightly("zero1", 3),
        slow("zero2", 2),
        nightly("zero3", 3),
    ],
)
def test_new_modes_look_along_the_gradient(pool: Pool, corpus: Path, engine: str, world_size: int) -> None:
    """One step of a randomised SVD on rows finds most of what the best directions hold, and changes no logit."""
    config = short_config(
        corpus,
        parallel__engine=engine,
        lowrank__growth_init="gradient",
        train__steps=9,
        train__global_batch_size=6,
        train__micro_batch_size=1,
    )
    shares = pool.run("checks:aims_at_the_gradient", config, world_size=world_size)
    assert len(set(shares)) == 1
    assert shares[0] > 0.75
    if world_size == 1:
        config.lowrank.growth_init = "random"  # the control
        assert max(pool.run("checks:aims_at_the_gradient", config, world_size=1)) < 0.4


VARIANTS = {
    "gradient directions": {"lowrank__growth_init": "gradient"},
    "published growth": {
        "lowrank__base": "none",
        "lowrank__init": "kaiming",
        "lowrank__measure": "product",
        "lowrank__criterion": "variance",
        "lowrank__growth_init": "published",
        "lowrank__buffer": 4,
    },
    "sgd": {"optimizer__name": "sgd", "optimizer__lr": 0.1},
    "muon": {"optimizer__name": "muon", "lowrank__mode": "full"},
    "spectron": {"optimizer__name": "spectron"},
    "lora_muon": {"optimizer__name": "lora_muon", "lowrank__targets": "[mlp]"},
    "sliced moments": {"optimizer__moments_on_event": "slice"},
    "reset moments": {"optimizer__moments_on_event": "reset"},
    "freeze by itself": {"lowrank__freeze_step": "auto", "lowrank__freeze_patience": 1, "lowrank__interval": 4},
    "uniform": {"lowrank__final": "uniform"},
    "budget": {"lowrank__final": "budget", "lowrank__final_budget": 0.2},
    "random ranks": {"lowrank__final": "random", "lowrank__final_budget": 0.2},
    "frozen base, variance": {"lowrank__base": "frozen", "lowrank__criterion": "variance"},
    "no base, product": {"lowrank__base": "none", "lowrank__init": "kaiming", "lowrank__measure": "product"},
    "no base, update": {"lowrank__base": "none", "lowrank__init": "spectral"},
    "inrank": {"lowrank__mode": "inrank", "lowrank__base": "frozen"},
    "inrank, decay": {"lowrank__mode": "inrank"},
    "fixed, decay": {"lowrank__mode": "fixed", "lowrank__initial_rank": 4},
    "fixed, spectral ones": {"lowrank__mode": "fixed", "lowrank__base": "none", "lowrank__init": "spectral_ones"},
    "full": {"lowrank__mode": "full"},
    "bottleneck": {
        "lowrank__mode": "fixed",
        "lowrank__base": "none",
        "lowrank__activation": "silu",
        "lowrank__initial_rank": 6,
    },
    "crossing, checkpointed": {"model__layer_crossing": "true", "train__activation_checkpointing": "true"},
    "dense, then growth": {
        "lowrank__base": "none",
        "lowrank__dense_fraction": 0.25,
        "lowrank__freeze_step": 9,
        "lowrank__threshold": 0.8,
    },
    "dense, then fixed": {
        "lowrank__mode": "fixed",
        "lowrank__base": "none",
        "lowrank__dense_fraction": 0.4,
        "lowrank__initial_rank": 6,
    },
    "dense, lora_muon": {
        "optimizer__name": "lora_muon",
        "lowrank__base": "none",
        "lowrank__dense_fraction": 0.3,
        "lowrank__final": "budget",
        "lowrank__final_budget": 0.3,
    },
    "frobenius decay": {"lowrank__frobenius_decay": 0.5},
    "frobenius in the loss": {"lowrank__frobenius_decay": 0.5, "lowrank__frobenius_in_loss": "true"},
    "multiple of 2, patterns": {
        "lowrank__multiple_of": 2,
        "lowrank__initial_rank": 2,
        "lowrank__targets": r"['mlp\.up','attention\.[qk]$']",
    },
    "deep": {"lowrank__depth": 3, "lowrank__init_scale": 0.4},
    "deep, no base": {"lowrank__depth": 4, "lowrank__base": "none", "lowrank__init": "spectral"},
    "deep, product": {"lowrank__depth": 3, "lowrank__base": "none", "lowrank__measure": "product"},
    "deep, gradient directions": {"lowrank__depth": 3, "lowrank__growth_init": "gradient"},
    "deep, frobenius decay, slow outer factors": {
        "lowrank__depth": 4,
        "lowrank__frobenius_decay": 0.5,
        "lowrank__outer_lr_scale": 0.1,
    },
    "deep, frobenius in the loss": {
        "lowrank__depth": 3,
        "lowrank__frobenius_decay": 0.5,
        "lowrank__frobenius_in_loss": "true",
    },
    "deep, fixed outer factors": {
        "lowrank__depth": 3,
        "lowrank__mode": "fixed",
        "lowrank__base": "frozen",
        "lowrank__initial_rank": 5,
        "lowrank__outer_lr_scale": 0,
    },
    "deep, sgd, reset": {
        "lowrank__depth": 3,
        "optimizer__name": "sgd",
        "optimizer__lr": 0.1,
        "optimizer__moments_on_event": "reset",
    },
    "activation checkpointing": {"train__activation_checkpointing": "true"},
    "no clipping, wsd": {"train__grad_clip": 0, "schedule__name": "wsd", "schedule__warmup_steps": 3},
    "untied head": {"model__tie_embeddings": "false"},
    "factored head": {"model__tie_embeddings": "false", "lowrank__targets": "['mlp','head']"},
}


NOT_WITH_ZERO = (
    "muon",
    "spectron",
    "lora_muon",
    "dense, lora_muon",
    "frobenius in the loss",
    "deep, frobenius in the loss",
)
"""Which ZeRO, that cuts parameters anywhere, is refused with."""

OF_THE_DECISION = (
    "freeze by itself", "uniform", "budget", "inrank", "inrank, decay", "fixed, decay", "multiple of 2, patterns",
    "no base, product", "no clipping, wsd", "reset moments", "fixed, spectral ones", "factored head",
    "dense, then fixed", "bottleneck", "deep, product", "deep, gradient directions", "deep, fixed outer factors",
    "deep, sgd, reset",
)  # fmt: skip
"""Where engines do nothing that they do not do in the others: FSDP2 in CI, ZeRO-3 nightly."""


COVERED = ("deep", "deep, no base", "deep, frobenius in the loss")
"""Whose parts "deep, frobenius decay, slow outer factors" and test_deep.py have in the default tier."""


@pytest.mark.parametrize(
    ("engine", "variant"),
    [
        *(
            slow("fsdp", variant) if variant in (*OF_THE_DECISION, *COVERED) else ("fsdp", variant)
            for variant in VARIANTS
        ),
        *(
            (nightly if variant in OF_THE_DECISION else slow)("zero3", variant)
            for variant in VARIANTS
            if variant not in NOT_WITH_ZERO
        ),
    ],
)
def test_every_mode_is_the_same_sharded(pool: Pool, corpus: Path, engine: str, variant: str) -> None:
    blocks = {} if "crossing" in variant else {"model__num_layers": 1}  # several: in the tests of every engine
    config = short_config(corpus, **blocks, **VARIANTS[variant])
    reference = trained_once(config)
    config.parallel.engine = engine
    result = pool.run("runs:train_in_worker", config, world_size=2)
    assert_same_run(result, reference, 2)
    rebuilt = {record["kind"] for record in reference.records} & {"rank_event", "base_removed"}
    settings = config.lowrank
    assert ("rank_event" in rebuilt) == (settings.grows or settings.dense_fraction > 0)
    assert ("base_removed" in rebuilt) == (settings.mode != "full" and settings.base == "decay")
    if settings.base == "decay" or settings.base == "none":
        assert not any(base for _, _, base in reference.table.values())


def test_the_columns_of_a_weight_are_no_modes(corpus: Path) -> None:
    """``slice`` keeps nothing of the moments of a weight that becomes factors; ``transport`` does."""
    losses = {}
    for rule in ("slice", "reset", "transport"):
        losses[rule] = trained_once(
            short_config(corpus, **VARIANTS["dense, then fixed"], optimizer__moments_on_event=rule)
        ).losses()
    assert losses["slice"] == losses["reset"] != losses["transport"]


ZERO_SETTINGS = {
    "sgd": ("zero2", {"optimizer__name": "sgd", "optimizer__lr": 0.1}),
    "frobenius decay": ("zero2", {"lowrank__frobenius_decay": 0.5}),
    "frozen base": ("zero1", {"lowrank__base": "frozen"}),
    "gathered each time": ("zero3", {"parallel__deepspeed": GATHERED_EACH_TIME}),
    "small buckets": ("zero2", {"parallel__deepspeed": "{zero_optimization: {reduce_bucket_size: 1000}}"}),
    "no overlap, no scatter": (
        "zero1",
        {"parallel__deepspeed": "{zero_optimization: {overlap_comm: false, reduce_scatter: false}}"},
    ),
    "offload, stage 2": ("zero2", {"parallel__offload_optimizer": "true"}),
    "offload, stage 3": ("zero3", {"parallel__offload_optimizer": "true"}),
}


@pytest.mark.parametrize(
    ("engine", "settings"),
    # An optimizer on the CPU has DeepSpeed compile for a minute.
    [(nightly if name.startswith("offload") else slow)(*case) for name, case in ZERO_SETTINGS.items()],
    ids=ZERO_SETTINGS.keys(),
)
def test_settings_change_no_result_of_deepspeed(
    pool: Pool, corpus: Path, engine: str, settings: dict[str, object]
) -> None:
    config = short_config(corpus, parallel__engine=engine, **settings)
    result = pool.run("runs:train_in_worker", config, world_size=2)
    assert_same_run(result, trained_once(config), 2)


@pytest.mark.parametrize(
    "engine", [slow("ddp"), "fsdp", nightly("zero0"), slow("zero1"), nightly("zero2"), slow("zero3")]
)
def test_bf16_stays_near_fp32(pool: Pool, corpus: Path, engine: str) -> None:
    """Weights and moments stay fp32; the loss of a short run differs by bfloat16's rounding only."""
    config = short_config(corpus, parallel__engine=engine)
    exact = trained_once(config).losses()
    config.train.precision = "bf16"
    losses = pool.run("runs:train_in_worker", config, world_size=2)[0].losses()
    assert losses == pytest.approx(exact, rel=5e-3)
    assert losses != exact


@pytest.mark.timeout(620)
@pytest.mark.parametrize(
    "engine", [nightly("ddp"), nightly("fsdp"), nightly("zero0"), nightly("zero1"), nightly("zero2"), nightly("zero3")]
)
def test_compiled_is_the_same(pool: Pool, corpus: Path, engine: str) -> None:
    config = short_config(corpus, parallel__engine=engine)
    reference = trained_once(config)
    config.train.compile = True
    result = pool.run("runs:train_in_worker", config, world_size=2, timeout=600)
    assert_same_run(result, reference, 2)


def test_budget_and_uniform_stay_below_the_cap_and_show_what_they_explain(corpus: Path) -> None:
    """The explained ratio that is kept is that of the rank that was chosen, not of the rule's."""
    for final in ("uniform", "budget"):
        config = small_config(
            corpus, lowrank__final=final, lowrank__final_budget=1.0, lowrank__max_rank_fraction=0.1, train__steps=24
        )
        kept = []
        recorder, table = train(config, hook=kept.append)
        assert {rank for rank, _, _ in table.values()} <= {1, 2, 3}
        check = [record for record in recorder.records if record["kind"] == "rank_check"][-1]["layers"]
        for name, share in kept[0].ranks.reached.items():
            assert share >= check[name]["explained"] or check[name]["rank"] < 3


def test_a_tied_head_is_not_factored(corpus: Path) -> None:
    with pytest.raises(UserError, match="tied to the embedding"):
        train(small_config(corpus, lowrank__targets="[head]"))
    _, table = train(small_config(corpus, lowrank__targets="['.*']", model__tie_embeddings="false", train__steps=24))
    assert "head" in table


@pytest.mark.parametrize(("lr", "says"), [(1e30, "at step 11 the loss is not finite"), (3e38, "is not finite")])
def test_divergence_is_told(corpus: Path, lr: float, says: str) -> None:
    """Spectra of factors that are not finite would stop one process in its eigensolver and leave the others waiting."""
    with pytest.raises(UserError, match=says):
        train(small_config(corpus, optimizer__lr=lr, log__interval=100))


@pytest.mark.parametrize("variant", [slow("muon"), "lora_muon"])
def test_replicas_of_shards_move_matrices_alike(pool: Pool, corpus: Path, variant: str) -> None:
    """Two replicas of two shards: Grams are summed and matrices divided within a replica."""
    config = short_config(corpus, train__micro_batch_size=2, **VARIANTS[variant])
    reference = trained_once(config)
    config.parallel.engine, config.parallel.shard_size = "fsdp", 2
    result = pool.run("runs:train_in_worker", config, world_size=4)
    assert_same_run(result, reference, 4)
