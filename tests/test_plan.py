"""``inrank plan``: its formulas against what is held and sent in real runs, and the published sizes."""

from pathlib import Path

import pytest
from cost_checks import fetched_in_a_step
from pool import Pool
from runs import Fails, small_config

from inrank_dist.commands.main import main

CONFIGS = Path(__file__).parent.parent / "configs"


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


WIDE = {
    "model__hidden_size": 128,
    "model__num_heads": 4,
    "lowrank__initial_rank": 4,
    "lowrank__buffer": 4,
    "lowrank__interval": 2,
    "lowrank__warmup_steps": 4,
}
"""Weights large enough beside the buffers of a batch; frozen after four steps."""

STAGES = {
    "full": ({"lowrank__mode": "full"}, 1),
    "growing over a base": ({}, 2),
    "frozen": ({}, 5),
    "frozen base": ({"lowrank__base": "frozen"}, 5),
    "sgd": ({"optimizer__name": "sgd", "optimizer__lr": 0.1}, 5),
}


@pytest.mark.parametrize(("changes", "steps"), STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("accumulation", [1, slow(2)])
def test_fsdp_holds_and_sends_what_the_formulas_say(
    pool: Pool, corpus: Path, changes: dict[str, object], steps: int, accumulation: int
) -> None:
    """Nothing else is kept either: the base is really gone after the freeze."""
    config = small_config(corpus, **WIDE, **changes, train__global_batch_size=4 * accumulation)
    config.parallel.engine = "fsdp"
    for held, formula, sent, sent_formula in pool.run("cost_checks:held_and_sent", config, steps, world_size=2):
        assert held == pytest.approx(formula, rel=0.02)
        assert sent == pytest.approx(sent_formula, abs=300)  # the loss, the norm and the verdict of the step travel too


@pytest.mark.parametrize("each", ["true", "false"])
def test_gradients_are_divided_after_every_micro_batch_unless_told_otherwise(
    pool: Pool, corpus: Path, each: str
) -> None:
    """Whole ones would be the largest thing that a process holds: a model divided by 64 keeps 1/64 of all else."""
    config = small_config(
        corpus, **WIDE, lowrank__mode="full", train__global_batch_size=8, parallel__reduce_each_micro_batch=each
    )
    config.parallel.engine = "fsdp"
    for held, formula in pool.run("cost_checks:held_before_the_last_micro_batch", config, world_size=2):
        assert held == pytest.approx(formula, rel=0.02)
    for _, _, sent, formula in pool.run("cost_checks:held_and_sent", config, 1, world_size=2):
        assert sent == pytest.approx(formula, abs=300)


@pytest.mark.parametrize(("each", "scatters"), [("true", 2), ("false", 1)])
def test_replicas_sum_gradients_once_a_step(pool: Pool, corpus: Path, each: str, scatters: int) -> None:
    """With hybrid sharding, however many micro-batches there are."""
    layers = 3
    config = small_config(
        corpus, model__num_layers=layers, train__global_batch_size=8, train__micro_batch_size=1,
        parallel__engine="fsdp", parallel__shard_size=2, parallel__reduce_each_micro_batch=each,
    )  # fmt: skip
    for seen in pool.run("cost_checks:collectives_of_a_step", config, world_size=4):
        names = [name for name, _ in seen]
        assert names.count("reduce_scatter_base") == scatters * (layers + 1)
        assert names.count("allreduce") == layers + 1 + 2  # gradients, the norm, and the verdict


def test_a_block_is_gathered_as_one(pool: Pool, corpus: Path) -> None:
    """Growing, in the forward and in the backward pass, however many factors it has; and the rest once."""
    layers = 3
    config = small_config(corpus, **WIDE, model__num_layers=layers, parallel__engine="fsdp")
    config.train.global_batch_size = 4
    for seen in pool.run("cost_checks:collectives_of_a_step", config, world_size=2):
        names = [name for name, _ in seen]
        assert names.count("allgather_base") == 2 * layers + 1
        assert names.count("reduce_scatter_base") == layers + 1
        assert names.count("allreduce") == 2  # the norm, and the verdict


def test_a_step_waits_for_the_device_as_often_however_many_layers_there_are(corpus: Path) -> None:
    """A number that is fetched layer by layer would have a GPU stand still as often."""
    counts = {fetched_in_a_step(small_config(corpus, model__num_layers=layers)) for layers in (1, 4)}
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("engine", "changes", "world_size"),
    [
        ("ddp", {}, 2),
        slow("ddp", {"lowrank__mode": "full"}, 3),
        ("fsdp", {"train__precision": "bf16"}, 3),
        slow("zero0", {}, 2),
        slow("zero1", {}, 2),
        slow("zero2", {}, 2),
        slow("zero3", {}, 2),
        slow("zero3", {"lowrank__mode": "full"}, 2),
    ],
)
def test_every_engine_sends_what_the_formula_says(
    pool: Pool, corpus: Path, engine: str, changes: dict[str, object], world_size: int
) -> None:
    batch = 4 * world_size
    wide = WIDE | {"model__hidden_size": 384} if engine == "zero3" else WIDE  # matrices on both sides of its threshold
    config = small_config(corpus, **wide, **changes, train__global_batch_size=batch, parallel__engine=engine)
    steps = 1 if changes.get("lowrank__mode") == "full" else 5
    for _, _, sent, formula in pool.run("cost_checks:held_and_sent", config, steps, world_size=world_size):
        # DeepSpeed fills its buckets and parts up; the small collectives of a step are counted as well.
        assert sent == pytest.approx(formula, rel=0.01 if engine.startswith("zero") else 0, abs=500)


@pytest.mark.parametrize(
    ("size", "rank", "dense", "frozen"),
    [("small", 254, "124.4M", "91.2M"), ("medium", 287, "354.8M", "224.0M"), ("large", 313, "774.0M", "446.4M")],
)
def test_published_sizes(size: str, rank: int, dense: str, frozen: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The parameter counts of arXiv 2306.11250, without the hardware."""
    words = ["--config", str(CONFIGS / f"gpt2-{size}-efficient.yaml"), "--rank", str(rank)]
    assert main(["plan", *words, "--world-size", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    counts = [line.split()[1:] for line in lines if line.startswith("parameters")]
    assert [counts[0][0], counts[0][-1]] == [dense, frozen]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--world-size 0", "--world-size is 0; write a whole number of at least 1"),
        ("--rank 0", "--rank is 0"),
        ("--rank 65", "--rank is 65 but lowrank.max_rank_fraction 0.5 caps the rank of blocks.0.attention.q at 64"),
        ("--rank 5 --lowrank.mode fixed", "--rank is 5 but with lowrank.mode fixed no rank grows; leave it out"),
        ("--world-size 3", "train.global_batch_size is 16"),
        ("--world-size 2 --parallel.engine local", "parallel.engine is local but 2 processes"),
    ],
)
def test_mistakes_are_one_line(words: str, says: str, fails: Fails) -> None:
    assert says in fails("plan", "--config", CONFIGS / "quickstart.yaml", *words.split())


def test_each_mode_has_its_stages(capsys: pytest.CaptureFixture[str]) -> None:
    headings = {
        "full": [],
        "fixed": ["at the start", "without base"],
        "inrank": ["at the start", "grown"],
        "efficient": ["at the start", "after the freeze"],
    }
    for mode, stages in headings.items():
        assert main(["plan", "--config", str(CONFIGS / "quickstart.yaml"), "--lowrank.mode", mode]) == 0
        out = capsys.readouterr().out
        assert all(stage in out for stage in stages)
        assert "dense" in out
