"""A resumed run is the same run, on any engine and any number of processes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from pool import Pool
from runs import short_config, tensor_bytes, train
from sharing import nightly, slow

from inrank_dist.runtime.errors import UserError
from inrank_dist.train.checkpoint import find_checkpoint, list_checkpoints, stored_tensors

STEPS = 12
EVENTS = (3, 6, 9)
AROUND_EVENTS = [1, 3, 5, 7, 9, slow(2), slow(4), slow(6), slow(8), slow(10), slow(11)]
DROPOUT = {"model__dropout": 0.1, "checkpoint__interval": 1, "checkpoint__keep": STEPS}


def cut(source: Path, target: Path, step: int) -> Path:
    """A run folder as it was when it was killed just after the checkpoint of ``step``."""
    shutil.copytree(source / "checkpoints", target / "checkpoints")
    for folder in list_checkpoints(target):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return target


def joined(results: list[Any], step: int) -> list[int]:
    """The samples of a step over all processes, in order."""
    return [sample for result in results for sample in result[1][step]]


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An undisturbed run on one process, with a checkpoint of every step."""
    run = tmp_path_factory.mktemp("straight")
    recorder, table = train(short_config(corpus, run__dir=run, **DROPOUT))
    return run, (recorder.losses(), recorder.samples, table)


@pytest.mark.parametrize("step", AROUND_EVENTS)
def test_resume_is_bit_identical(corpus: Path, straight: tuple[Path, Any], tmp_path: Path, step: int) -> None:
    """Just before, at and just after every rank event, in the decay of the base, and after the freeze."""
    run, (losses, samples, table) = straight
    cut(run, tmp_path, step)
    recorder, resumed = train(short_config(corpus, run__dir=tmp_path, **DROPOUT), resume=True)
    assert recorder.losses() == losses[step:]
    assert recorder.samples == samples[step:]
    assert resumed == table
    assert tensor_bytes(tmp_path) == tensor_bytes(run)


@pytest.fixture(scope="module")
def sharded(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An undisturbed run of four processes with FSDP2, with a checkpoint at every rank event."""
    run = tmp_path_factory.mktemp("sharded")
    config = short_config(
        corpus, run__dir=run, checkpoint__interval=3, checkpoint__keep=STEPS, train__global_batch_size=12,
        train__micro_batch_size=3,
    )  # fmt: skip
    results = pool.run("runs:train_in_worker", config, world_size=4, timeout=100)
    losses = [record["loss"] for record in results[0][0] if record["kind"] == "step"]
    samples = [joined(results, step) for step in range(STEPS)]
    return run, (losses, samples, results[0][2])


ON_OTHERS = [("local", 1, None), ("fsdp", 2, None), ("ddp", 2, None), ("fsdp", 3, None), ("fsdp", 4, 2)]
ON_ZERO = [(3, "zero0", 3), (6, "zero1", 3), (3, "zero2", 1), (9, "zero2", 3), (9, "zero3", 1), (6, "zero3", 2)]


def at_one_event_each() -> list[object]:
    """Every layout goes on at one event, every event is one of them; the full product nightly."""
    return [
        (step, *other) if EVENTS[index % 3] == step else nightly(step, *other)
        for index, other in enumerate(ON_OTHERS)
        for step in EVENTS
    ]


@pytest.mark.parametrize(
    ("step", "engine", "world_size", "shard_size"),
    [
        *at_one_event_each(),
        *(slow(*other, None) for other in ON_ZERO),
    ],
)
def test_resume_on_other_processes_and_engines(
    pool: Pool,
    corpus: Path,
    sharded: tuple[Path, Any],
    tmp_path: Path,
    engine: str,
    world_size: int,
    shard_size: int | None,
    step: int,
) -> None:
    """Save on four; go on with one, two, three or a hybrid: same samples, same ranks, same losses to 1e-6."""
    run, (losses, samples, table) = sharded
    cut(run, tmp_path, step)
    config = short_config(
        corpus, run__dir=tmp_path, train__global_batch_size=12, train__micro_batch_size=12 // world_size,
        parallel__engine=engine, parallel__shard_size=shard_size,
    )  # fmt: skip
    results = pool.run("runs:train_in_worker", config, True, world_size=world_size)
    assert [r["loss"] for r in results[0][0] if r["kind"] == "step"] == pytest.approx(losses[step:], rel=1e-6)
    assert [joined(results, i) for i in range(STEPS - step)] == samples[step:]
    assert all(result[2] == table for result in results)


@pytest.mark.parametrize("name", [slow("muon"), slow("lora_muon")])
def test_the_momentum_of_matrices_goes_on(pool: Pool, corpus: Path, tmp_path: Path, name: str) -> None:
    """Saved by two processes at a growth, taken up by three and by one: same losses to 1e-6, same ranks."""
    mode = "full" if name == "muon" else "efficient"
    settings: dict[str, Any] = {
        "optimizer__name": name, "lowrank__mode": mode, "checkpoint__interval": 3, "parallel__engine": "fsdp",
        "train__global_batch_size": 6, "train__micro_batch_size": 2, "checkpoint__keep": STEPS,
    }  # fmt: skip
    config = short_config(corpus, run__dir=tmp_path / "2", **settings | {"train__micro_batch_size": 3})
    whole = pool.run("runs:train_in_worker", config, world_size=2)
    losses = [r["loss"] for r in whole[0][0] if r["kind"] == "step"]
    for world_size in (1, 3):
        cut(tmp_path / "2", tmp_path / str(world_size), 6)
        config = short_config(corpus, run__dir=tmp_path / str(world_size), **settings)
        rest = pool.run("runs:train_in_worker", config, True, world_size=world_size)
        assert [r["loss"] for r in rest[0][0] if r["kind"] == "step"] == pytest.approx(losses[6:], rel=1e-6)
        assert rest[0][2] == whole[0][2]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        slow(("ddp", 2), ("fsdp", 3)), nightly(("local", 1), ("fsdp", 2)), slow(("ddp", 4), ("local", 1)),
        nightly(("local", 1), ("ddp", 2)), nightly(("zero0", 2), ("fsdp", 3)), slow(("zero1", 3), ("fsdp", 2)),
        nightly(("zero2", 2), ("fsdp", 1)), nightly(("zero3", 3), ("fsdp", 2)), slow(("zero3", 2), ("zero1", 4)),
        slow(("zero2", 4), ("local", 1)),
    ],
)  # fmt: skip
def test_and_back(pool: Pool, corpus: Path, tmp_path: Path, first: tuple[str, int], then: tuple[str, int]) -> None:
    """Saved by the others, too: same samples, same ranks, same losses to 1e-6."""
    settings: dict[str, Any] = {
        "run__dir": tmp_path, "checkpoint__interval": 6, "train__global_batch_size": 12
    }  # fmt: skip
    config = short_config(corpus, **settings, parallel__engine=first[0], train__micro_batch_size=12 // first[1])
    whole = pool.run("runs:train_in_worker", config, world_size=first[1])
    shutil.rmtree(list_checkpoints(tmp_path)[-1])
    config = short_config(corpus, **settings, parallel__engine=then[0], train__micro_batch_size=12 // then[1])
    rest = pool.run("runs:train_in_worker", config, True, world_size=then[1])
    losses, again = ([r["loss"] for r in results[0][0] if r["kind"] == "step"] for results in (whole, rest))
    assert again == pytest.approx(losses[6:], rel=1e-6)
    assert [joined(rest, i) for i in range(STEPS - 6)] == [joined(whole, i) for i in range(6, STEPS)]
    assert rest[0][2] == whole[0][2]


@pytest.mark.parametrize("stage", [nightly(1), nightly(2), slow(3)])
def test_fsdp_to_zero_and_back_in_the_warm_up(
    pool: Pool, corpus: Path, sharded: tuple[Path, Any], tmp_path: Path, stage: int
) -> None:
    """FSDP2 on four up to step 3, ZeRO on three over the growth at 6, FSDP2 on two over the freeze: losses to 1e-6."""
    run, (losses, samples, table) = sharded
    cut(run, tmp_path, 3)
    settings: dict[str, Any] = {"train__global_batch_size": 12, "train__micro_batch_size": 2}
    config = short_config(
        corpus, run__dir=tmp_path, parallel__engine=f"zero{stage}", checkpoint__interval=1, checkpoint__keep=STEPS,
        **settings,
    )  # fmt: skip
    middle = pool.run("runs:train_in_worker", config, True, world_size=3)
    cut(tmp_path, tmp_path / "back", 7)
    config = short_config(corpus, run__dir=tmp_path / "back", parallel__engine="fsdp", **settings)
    last = pool.run("runs:train_in_worker", config, True, world_size=2)
    seen = [[r["loss"] for r in results[0][0] if r["kind"] == "step"] for results in (middle, last)]
    assert seen[0] == pytest.approx(losses[3:], rel=1e-6)
    assert seen[1] == pytest.approx(losses[7:], rel=1e-6)
    assert [joined(last, i) for i in range(STEPS - 7)] == samples[7:]
    assert all(result[2] == table for result in (*middle, *last))


def test_sharded_resume_is_bit_identical(pool: Pool, corpus: Path, sharded: tuple[Path, Any], tmp_path: Path) -> None:
    """The same engine on the same processes loses nothing either: weights and moments byte for byte."""
    run, (losses, _, _) = sharded
    cut(run, tmp_path, 6)
    config = short_config(corpus, run__dir=tmp_path, train__global_batch_size=12, train__micro_batch_size=3)
    results = pool.run("runs:train_in_worker", config, True, world_size=4)
    assert [r["loss"] for r in results[0][0] if r["kind"] == "step"] == losses[6:]
    assert tensor_bytes(tmp_path) == tensor_bytes(run)


@pytest.mark.parametrize(
    "settings",
    [
        nightly({"parallel__engine": "zero0"}),
        slow({"parallel__engine": "zero1", "train__precision": "bf16"}),
        nightly({"parallel__engine": "zero2", "parallel__offload_optimizer": "true"}),
        nightly({"parallel__engine": "zero3", "parallel__offload_optimizer": "true"}),
        slow({"parallel__engine": "zero3", "optimizer__name": "sgd", "lowrank__growth_init": "gradient"}),
        nightly({"parallel__engine": "zero2", "checkpoint__async": "true", "lowrank__base": "frozen"}),
    ],
    ids=lambda settings: ", ".join(map(str, settings.values())),
)
def test_resume_with_deepspeed_is_bit_identical(
    pool: Pool, corpus: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Cut after the first growth: the second one and the freeze follow."""
    settings = {"checkpoint__interval": 4, "checkpoint__keep": STEPS, **settings}
    runs = {name: short_config(corpus, run__dir=tmp_path / name, **settings) for name in ("whole", "rest")}
    whole = pool.run("runs:train_in_worker", runs["whole"], world_size=2)
    cut(tmp_path / "whole", tmp_path / "rest", 4)
    rest = pool.run("runs:train_in_worker", runs["rest"], True, world_size=2)
    assert rest[0].losses() == whole[0].losses()[4:]
    assert tensor_bytes(tmp_path / "rest") == tensor_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_a_checkpoint_saved_after_validation_is_whole(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """FSDP2 leaves the root group gathered after a forward pass without backward; its moments must be saved
    all the same."""
    config = short_config(corpus, run__dir=tmp_path, train__steps=9, eval__interval=3)
    pool.run("runs:train_in_worker", config, world_size=2)
    shapes = stored_tensors(list_checkpoints(tmp_path)[-1])
    trained = {name for name in shapes if not name.startswith("optimizer.")}
    assert {name for name in shapes if name.startswith("optimizer.")} == {
        f"optimizer.{moment}.{name}" for name in trained for moment in ("exp_avg", "exp_avg_sq")
    }


def test_a_checkpoint_holds_no_pickle_and_keeps_the_newest(corpus: Path, tmp_path: Path) -> None:
    train(short_config(corpus, run__dir=tmp_path, checkpoint__interval=4, checkpoint__keep=2))
    folders = list_checkpoints(tmp_path)
    assert [folder.name for folder in folders] == ["step-00000008", "step-00000012"]
    names = {file.name for file in folders[-1].iterdir()}
    assert {"state.json", "config.yaml", "tokenizer.model", "manifest.json", "complete"} < names
    assert all(name.endswith((".safetensors", ".json", ".yaml", ".model")) for name in names - {"complete"})


def test_an_incomplete_checkpoint_is_not_found(corpus: Path, straight: tuple[Path, Any], tmp_path: Path) -> None:
    """What a killed save leaves has another name; the next save of that step replaces it."""
    run, _ = straight
    cut(run, tmp_path, 7)
    shutil.copytree(run / "checkpoints/step-00000008", tmp_path / "checkpoints/tmp-step-00000008")
    assert find_checkpoint(tmp_path).state.step == 7
    train(short_config(corpus, run__dir=tmp_path, **DROPOUT), resume=True)
    assert not list((tmp_path / "checkpoints").glob("tmp-*"))
    assert tensor_bytes(tmp_path) == tensor_bytes(run)


def test_a_checkpoint_of_other_shapes_is_refused(corpus: Path, straight: tuple[Path, Any], tmp_path: Path) -> None:
    run, _ = straight
    cut(run, tmp_path, 9)
    changed = short_config(corpus, run__dir=tmp_path, model__tie_embeddings="false", **DROPOUT)
    with pytest.raises(UserError, match=r"head\.weight as nothing where the settings make float32"):
        train(changed, resume=True)


def test_other_data_is_refused(corpus: Path, straight: tuple[Path, Any], tmp_path: Path) -> None:
    run, _ = straight
    cut(run, tmp_path, 9)
    changed = short_config(corpus, run__dir=tmp_path, data__paths=f"[{corpus}/corpus/0*.txt]", **DROPOUT)
    with pytest.raises(UserError, match="the data is now"):
        train(changed, resume=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer__name": "sgd", "optimizer__lr": 0.1},
        {"optimizer__name": "sgd", "optimizer__lr": 0.1, "optimizer__beta1": 0.0},
        {"lowrank__freeze_step": "auto", "lowrank__freeze_patience": 1, "lowrank__growth_init": "gradient"},
        {
            "lowrank__base": "none",
            "lowrank__dense_fraction": 0.27,
            "lowrank__freeze_step": 9,
            "lowrank__threshold": 0.8,
        },
    ],
    ids=["sgd", "sgd without momentum", "auto, gradient", "dense first"],
)
def test_resume_of_other_ways_is_bit_identical(corpus: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The momentum of SGD, if it has any, and how long no layer has grown, are part of the checkpoint."""
    changes |= {"checkpoint__interval": 1, "checkpoint__keep": STEPS}
    recorder, table = train(short_config(corpus, run__dir=tmp_path / "straight", **changes))
    for step in (2, 3, 7, 11):
        run = cut(tmp_path / "straight", tmp_path / str(step), step)
        resumed, again = train(short_config(corpus, run__dir=run, **changes), resume=True)
        assert resumed.losses() == recorder.losses()[step:]
        assert again == table
        assert tensor_bytes(run) == tensor_bytes(tmp_path / "straight")
        assert find_checkpoint(run).state.optimizer_steps == STEPS
