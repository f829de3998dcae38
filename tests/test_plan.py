"""``inrank plan``: its formulas against what is held and sent in real runs, and the published sizes."""

import re
from pathlib import Path

import pytest
import torch
from cost_checks import fetched_in_a_step, peak_of_a_micro_batch
from pool import Pool
from runs import Fails, short_config, small_config, train
from sharing import nightly, slow

from inrank_dist.commands.main import main
from inrank_dist.engine.activations import _peaks, micro_batch_activations
from inrank_dist.lowrank.convert import LayerLayout, convert
from inrank_dist.models import ModelSettings
from inrank_dist.train.building import dense_skeleton
from inrank_dist.train.checkpoint import list_checkpoints, stored_tensors
from inrank_dist.train.monitors.text import amount

CONFIGS = Path(__file__).parent.parent / "configs"


WIDE = {
    "model__hidden_size": 128,
    "model__num_heads": 4,
    "lowrank__initial_rank": 4,
    "lowrank__buffer": 4,
    "lowrank__interval": 2,
    "lowrank__warmup_steps": 4,
}
"""Weights large enough beside the buffers of a batch; frozen after four steps."""

DENSE_FIRST = {"lowrank__mode": "fixed", "lowrank__base": "none", "lowrank__dense_fraction": 0.07}
"""Two steps of 30."""

STAGES = {
    "full": ({"lowrank__mode": "full"}, 1),
    "growing over a base": ({}, 2),
    "frozen": ({}, 5),
    "frozen base": ({"lowrank__base": "frozen"}, 5),
    "sgd": ({"optimizer__name": "sgd", "optimizer__lr": 0.1}, 5),
    "muon": ({"optimizer__name": "muon", "lowrank__mode": "full"}, 1),
    "lora_muon": ({"optimizer__name": "lora_muon"}, 5),
    "dense, to be factored": (DENSE_FIRST, 1),
    "dense, then factored": (DENSE_FIRST, 4),
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
    # FSDP2 of torch 2.9 also keeps gathered parameters when it does not reduce the gradients.
    exact = each == "true" or torch.__version__ >= "2.11"
    for held, formula in pool.run("cost_checks:held_before_the_last_micro_batch", config, world_size=2):
        assert held == pytest.approx(formula, rel=0.02 if exact else 0.2)
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
        nightly("ddp", {"lowrank__mode": "full"}, 3),
        ("fsdp", {"train__precision": "bf16"}, 3),
        nightly("zero0", {}, 2),
        slow("zero1", {}, 2),
        nightly("zero2", {}, 2),
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
    words = ["--config", str(CONFIGS / f"gpt2-{size}-published.yaml"), "--rank", str(rank)]
    assert main(["plan", *words, "--world-size", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    counts = [line.split()[1:] for line in lines if line.startswith("parameters")]
    assert [counts[0][0], counts[0][-1]] == [dense, frozen]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--world-size 0", "--world-size is 0; write a whole number of at least 1"),
        ("--rank 0", "--rank is 0"),
        ("--rank 65", "--rank is 65 but lowrank.max_rank_fraction 0.5 caps the rank of blocks.1.attention.q at 64"),
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
    adamw = ["--optimizer.name", "adamw"]  # the quickstart's own moves factors alone
    for mode, stages in headings.items():
        small = ["--model.num_layers", "3", "--model.hidden_size", "64"]
        words = ["plan", "--config", str(CONFIGS / "quickstart.yaml"), "--lowrank.mode", mode, *adamw, *small]
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(stage in out for stage in stages)
        assert "dense" in out
    dense = ["--lowrank.mode", "fixed", "--lowrank.base", "none", "--lowrank.dense_fraction", "0.25"]
    assert main(["plan", "--config", str(CONFIGS / "quickstart.yaml"), *dense]) == 0
    out = capsys.readouterr().out
    assert "after step 100" in out and "at the start" not in out
    until = [*dense, "--lowrank.dense_until", "stable_rank", "--lowrank.max_rank_fraction", "0.25"]
    assert main(["plan", "--config", str(CONFIGS / "quickstart.yaml"), *until]) == 0
    out = capsys.readouterr().out
    assert "at the latest" in out and "at most 32 modes" in out
    assert main(["plan", "--config", str(CONFIGS / "quickstart.yaml"), "--world-size", "2"]) == 0
    out = capsys.readouterr().out
    assert "after the freeze, final_budget 0.33" in out and "about 21 to 33 modes" in out
    assert "engine fsdp, 2 processes, in each step 1 micro-batch of 8 sequences" in out
    assert re.search(r"^parameters +1\.1M +1\.2M +0\.7M$", out, re.MULTILINE)
    budget = ["--lowrank.mode", "fixed", "--lowrank.base", "none", "--lowrank.initial_budget", "0.3"]
    assert main(["plan", "--config", str(CONFIGS / "quickstart.yaml"), *budget]) == 0
    out = capsys.readouterr().out
    assert "30 modes" in out, "0.3 x 128 x 512 / 640, of the largest layers"


LONG = WIDE | {"model__max_seq_len": 96, "train__global_batch_size": 4, "train__micro_batch_size": 4}
"""Activations that outweigh the gradients."""


@pytest.mark.parametrize(
    "changes",
    [
        {"lowrank__mode": "full"},
        {"lowrank__mode": "full", "model__dropout": 0.1},
        {"lowrank__mode": "full", "train__activation_checkpointing": "true"},
        {"lowrank__mode": "full", "train__precision": "bf16"},
        {},
        {"model__name": "llama", "train__activation_checkpointing": "true"},
    ],
    ids=lambda changes: ", ".join(map(str, changes.values())),
)
def test_activations_are_what_a_step_takes(corpus: Path, changes: dict[str, object]) -> None:
    config = small_config(corpus, **LONG, **changes)
    measured, planned = peak_of_a_micro_batch(config)
    # Where gradients are larger than activations, their worst moments are only bounded together.
    bound = 1.2 if config.train.activation_checkpointing else 1.03
    assert 0.97 * measured < planned < bound * measured


@pytest.mark.parametrize(
    ("width", "sequences", "measured"),
    [(1024, 4, 6904.5), (1024, 24, 38054.4), (2048, 4, 12600.5), (2048, 24, 63089.2)],
)
def test_activations_are_what_an_h200_took(width: int, sequences: int, measured: float) -> None:
    """MiB beside weights and moments of 24 dense blocks, bf16, sequences of 1024, as ``bench`` measured them."""
    settings = ModelSettings(name="gpt2", hidden_size=width, num_layers=24, num_heads=16, max_seq_len=1024)
    found = micro_batch_activations(dense_skeleton(settings, 50257), sequences, 1024, bf16=True, checkpointing=False)
    assert found.peak / 2**20 == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_block_of_each_kind_tells_of_all(checkpointing: bool) -> None:
    """Layers of different ranks, against the pass of the whole model."""
    settings = ModelSettings(name="gpt2", hidden_size=64, num_layers=5, num_heads=4, max_seq_len=64, dropout=0.1)
    skeleton = dense_skeleton(settings, 301)
    ranks = {0: 8, 1: 30, 3: 8}
    model = convert(skeleton, {f"blocks.{i}.mlp.up": LayerLayout(rank, rank, i == 3) for i, rank in ranks.items()})
    found = micro_batch_activations(model, 4, 64, bf16=True, checkpointing=checkpointing)
    assert found.peak == max(_peaks(model, 4, 64, True, checkpointing, True, list(model.blocks)))


def mib(cell: str) -> float:
    number, unit = cell.split()
    return float(number) * {"MiB": 1, "GiB": 1024}[unit]


def table_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """First words of a row -> its cells."""
    assert main(["plan", "--config", str(CONFIGS / "quickstart.yaml"), *words]) == 0
    rows = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 1}


@pytest.mark.slow
def test_does_it_fit_and_how_long_does_a_step_take(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "h100", "--train.precision", "bf16", "--rank", "8"]
    table = table_of(words, capsys)
    assert all(cell.startswith("yes 0.0") for cell in table["fits, share of the memory"])
    times = [
        [float(cell) for cell in table[row]] for row in ("time of a step, lower bound, ms", "arithmetic", "memory")
    ]
    assert [max(pair) for pair in zip(*times[1:], strict=True)] == times[0]
    most = [mib(cell) for cell in table["at most in a step"]]
    limit = f"{(min(most) + max(most)) / 2:.3f}MiB"
    narrow = table_of([*words[2:], "--device", limit], capsys)
    assert {cell.split()[0] for cell in narrow["fits, share of the memory"]} == {"yes", "no"}
    smaller = table_of(["--train.activation_checkpointing", "true"], capsys)
    plain = table_of([], capsys)
    assert "time of a step, lower bound, ms" not in plain
    assert mib(smaller["activations"][0]) < 0.7 * mib(plain["activations"][0])
    assert mib(table_of(["--device", "cpu"], capsys)["activations"][0]) > 0


def test_the_ranks_of_a_run(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Fails) -> None:
    """One more column, of the parameters that the run ended with; another model's run is refused by a layer's name."""
    config = short_config(corpus, run__dir=tmp_path / "mine")
    _, table = train(config)
    (tmp_path / "mine" / "config.yaml").write_text(config.to_yaml())
    words = ["plan", "--config", str(tmp_path / "mine" / "config.yaml"), "--ranks-from", str(tmp_path / "mine")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "ranks of mine, step 12" in out
    mean = sum(rank for rank, _, _ in table.values()) / len(table)
    assert f"mean {mean:.1f}" in out
    stored = stored_tensors(list_checkpoints(tmp_path / "mine")[-1])
    count = sum(torch.Size(each.shape).numel() for name, each in stored.items() if not name.startswith("optimizer."))
    (row,) = [line.split() for line in out.splitlines() if line.startswith("parameters")]
    assert row[-1] == amount(count)
    assert "whose low-rank layers are others" in fails(*words, "--model.num_layers", "3")
    assert "which holds no checkpoint; write the folder of a training run" in fails(
        *words[:3], "--ranks-from", tmp_path
    )
    assert "has no ranks; leave it out" in fails(*words, "--lowrank.mode", "full")
    for device in ("h101", "", "-1", "0", "inf", "9e99", "1e"):
        assert "; write h100, h200, a100, cpu, or bytes of memory" in fails(*words[:3], f"--device={device}")
