"""Going on with other settings: what is refused at once, what is told, and branching off an older checkpoint."""

import json
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Fails, small_config, tensor_bytes

from inrank_dist.commands import plan
from inrank_dist.commands.main import main
from inrank_dist.config import SECTIONS, SETTINGS
from inrank_dist.engine.activations import micro_batch_activations
from inrank_dist.train.checkpoint import list_checkpoints, step_of

CHANGES: dict[str, Any] = {
    "train__steps": 20,
    "lowrank__interval": 4,
    "lowrank__warmup_steps": 8,
    "checkpoint__interval": 4,
    "checkpoint__keep": 9,
    "schedule__name": "wsd",
    "eval__interval": 10,
    "eval__batches": 1,
}
"""Twenty steps, the last four of which decay; a checkpoint of every fourth."""


def words(folder: Path, corpus: Path, name: str = "run", **changes: Any) -> list[str]:
    """The command line of a run in ``folder/name``."""
    config = small_config(corpus, run__dir=folder / name, **CHANGES | changes)
    (folder / f"{name}.yaml").write_text(config.to_yaml())
    return ["train", "--config", str(folder / f"{name}.yaml")]


@pytest.fixture(autouse=True)
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of a dry run, of which nothing is looked at here, takes seconds to count the activations of a layout:
    each count serves all."""
    counts: dict[int, Any] = {}

    def counted(model: torch.nn.Module, *shape: Any, **options: Any) -> Any:
        size = sum(parameter.numel() for parameter in model.parameters())
        if size not in counts:
            counts[size] = micro_batch_activations(model, *shape, **options)
        return counts[size]

    monkeypatch.setattr(plan, "micro_batch_activations", counted)


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, ``run``, and its config, ``run.yaml``."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(words(folder, corpus)) == 0
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path, corpus: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished / "run", tmp_path / "run")
    words(tmp_path, corpus)
    return tmp_path


def records(run: Path, *kinds: str) -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] in kinds]


def computed(run: Path) -> list[tuple[Any, ...]]:
    """What the steps of a run computed."""
    return [(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in records(run, "step")]


# The learning rate.


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "the learning rate goes" in record.getMessage()]


def test_a_jump_of_the_learning_rate_is_told(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = ["--train.steps", "40", "--allow-change", "train.steps"]
    assert main(["train", "--config", str(copied / "run.yaml"), *more, "--dry-run"]) == 0
    (told,) = warnings(caplog)
    caplog.clear()
    assert main(["train", "--config", str(copied / "run.yaml"), *more]) == 0
    assert [told] == warnings(caplog)
    rates = {step: lr for step, _, lr, _ in computed(copied / "run")}
    assert f"from {rates[20]:.3g} at step 20 to {rates[21]:.3g} at step 21, since train.steps was 20 and is 40" in told
    assert rates[21] == 3e-3 and rates[20] < 1e-3
    assert f"its decay began at step 16: --from {copied}/run --from-step 16 --run.dir NEW" in told


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"schedule__name": "cosine"}, "with schedule.name wsd it stays at its peak until the decay"),
        ({"checkpoint__keep": 1}, "no checkpoint from before it is kept"),
    ],
)
def test_how_to_avoid_a_jump(
    tmp_path: Path, corpus: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], says: str
) -> None:
    assert main(words(tmp_path, corpus, **changes)) == 0
    assert not warnings(caplog)
    more = ["--train.steps", "40", "--allow-change", "train.steps", "--dry-run"]
    assert main([*words(tmp_path, corpus, **changes), *more]) == 0
    (told,) = warnings(caplog)
    assert says in told


def test_no_word_where_nothing_jumps(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in list_checkpoints(copied / "run")[3:]:
        shutil.rmtree(folder)
    command = ["train", "--config", str(copied / "run.yaml"), "--dry-run"]
    assert main([*command, "--train.steps", "40", "--allow-change", "train.steps"]) == 0
    assert main([*command, "--optimizer.lr", "0.01", "--allow-change", "optimizer.lr"]) == 0
    (told,) = warnings(caplog)
    assert "from 0.003 at step 12 to 0.01 at step 13, since optimizer.lr was 0.003 and is 0.01" in told


# Branches.


def test_a_branch_is_the_run_that_it_would_have_been(
    copied: Path, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Twenty steps of a schedule of forty, from the stable phase of twenty; and the run it came from is untouched."""
    before = {path: path.read_bytes() for path in (copied / "run").rglob("*") if path.is_file()}
    branch = [*words(copied, corpus), "--from-step", "16", "--run.dir", str(copied / "new")]
    assert main([*branch, "--train.steps", "24", "--allow-change", "train.steps"]) == 0
    assert not warnings(caplog)
    assert main(words(copied, corpus, "straight", train__steps=24)) == 0
    assert computed(copied / "new") == computed(copied / "straight")
    assert tensor_bytes(copied / "new") == tensor_bytes(copied / "straight")
    assert [r["loss"] for r in records(copied / "new", "eval")] == [
        r["loss"] for r in records(copied / "straight", "eval")
    ]
    assert [r["null_rank"] for r in records(copied / "new", "summary")[0]["ranks"].values()] == [
        r["null_rank"] for r in records(copied / "straight", "summary")[0]["ranks"].values()
    ]
    (resumed,) = records(copied / "new", "resume")
    assert (resumed["step"], resumed["branched_from"]) == (16, str(copied / "run"))
    assert [step_of(folder) for folder in list_checkpoints(copied / "new")] == [16, 20, 24]
    assert {path: path.read_bytes() for path in (copied / "run").rglob("*") if path.is_file()} == before


def test_a_branch_needs_its_source_no_more(copied: Path, corpus: Path) -> None:
    """It begins with a checkpoint of its own, so the same command goes on, and one without --from does."""
    branch = [*words(copied, corpus), "--from", str(copied / "run"), "--run.dir", str(copied / "new")]
    assert main([*branch, "--from-step", "8"]) == 0
    assert computed(copied / "new") == computed(copied / "run")
    shutil.rmtree(copied / "run")
    for folder in list_checkpoints(copied / "new")[1:]:
        shutil.rmtree(folder)
    assert [step_of(folder) for folder in list_checkpoints(copied / "new")] == [8]
    assert main([*branch, "--from-step", "8"]) == 0
    assert main(["train", "--config", str(copied / "new/config.yaml")]) == 0
    assert [step for step, *_ in computed(copied / "new")] == list(range(1, 21))


@pytest.mark.parametrize(
    "options, says",
    [
        (["--from-step", "16"], "run.dir is {0}/run, the folder that --from-step is to branch off; write --run.dir"),
        (["--from", "{0}/run"], "the folder that --from is to branch off; write --run.dir"),
        (["--from", "{0}/none", "--run.dir", "{0}/new"], "{0}/none is not a run folder"),
        (["--from", "{0}", "--run.dir", "{0}/new"], "{0} holds no checkpoint to branch off; write --from"),
        (["--from-step", "17", "--run.dir", "{0}/new"], "no checkpoint of step 17; write one of 4, 8, 12, 16, 20"),
        (["--from-step", "20", "--run.dir", "{0}/new"], "is of step 20 already; write a larger train.steps"),
        (["--from-step", "16", "--run.dir", "{0}/new", "--train.steps", "24"], "or --allow-change train.steps to go"),
        (["--from-step", "16", "--run.dir", "{0}/new", "--run.seed", "1"], "run.seed 0, now it is 1, which cannot"),
    ],
)
def test_mistakes_of_branches(copied: Path, fails: Fails, options: list[str], says: str) -> None:
    command = ["train", "--config", copied / "run.yaml", *(option.format(copied) for option in options)]
    assert says.format(copied) in fails(*command)
    assert says.format(copied) in fails(*command, "--dry-run")
    assert not (copied / "new").exists()


# Changed settings.

OTHER = {
    "model.name": "llama",
    "model.hidden_size": "40",
    "model.num_heads": "4",
    "model.intermediate_size": "48",
    "model.tie_embeddings": "false",
    "lowrank.targets": "[mlp]",
    "tokenizer.vocab_size": "310",
    "train.global_batch_size": "4",
}
WITH = {"lowrank.init": ["--lowrank.base", "none"], "train.cuda_graph": ["--train.compile", "true"]}


def others(key: str, present: Any) -> list[str]:
    """Values that a setting could have as well, as words."""
    kind = SETTINGS[key]
    if key in OTHER:
        return [OTHER[key]]
    if typing.get_origin(kind) is typing.Annotated:
        return [each for each in kind.__metadata__[0].names() if each != present]
    if typing.get_origin(kind) is typing.Literal:
        return [each for each in typing.get_args(kind) if each != present]
    if isinstance(present, bool):
        return [str(not present).lower()]
    if isinstance(present, int):
        return [str(present + 1 if key != "train.steps" else 40)]
    return [str(present * 0.9 + 0.01)] if isinstance(present, float) else []


def advised(copied: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """Setting and value that a run does not go on with, but is said to with --allow-change -> the words for that."""
    values = small_config(corpus, **CHANGES).to_dict()
    found = {}
    for key in SETTINGS:
        section, _, name = key.partition(".")
        for other in others(key, values[section][name]):
            argv = ["train", "--config", str(copied / "run.yaml"), f"--{key}", other, "--dry-run"]
            status, error = main(argv), capsys.readouterr().err
            if f"or --allow-change {key} to go on with it" in error:
                assert status == 2
                found[f"{key} {other}"] = [*argv[:-1], "--allow-change", key]
            else:
                assert status == 0 or "write" in error, error
                if SECTIONS[section].ON_RESUME.is_fixed(key.partition(".")[2]):
                    refused = error.startswith(f"error: {key} is {other} but ")  # beside the other settings
                    assert refused or "which cannot change within a run" in error or "has no such part" in error
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_advised_is_not_refused(copied: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = advised(copied, corpus, capsys)
    assert len(found) > 20 and {"train.steps 40", "lowrank.mode inrank", "lowrank.base frozen"} <= found.keys()
    for what, argv in found.items():
        assert main([*argv, "--dry-run"]) == 0, what


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_what_is_advised_works(copied: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for what, argv in advised(copied, corpus, capsys).items():
        shutil.copytree(copied / "run", copied / "again")
        shutil.rmtree(list_checkpoints(copied / "again")[-1])
        assert main([*argv, "--run.dir", str(copied / "again")]) == 0, what
        shutil.rmtree(copied / "again")


@pytest.mark.parametrize(
    "options, says",
    [
        (["--model.num_layers", "3"], "model.num_layers 2, now it is 3, which cannot change within a run; write 2,"),
        (["--lowrank.mode", "full"], "lowrank.mode efficient, now it is full, which cannot change within a run"),
        (["--tokenizer.vocab_size", "310"], "tokenizer.vocab_size 301, now it is 310, which cannot"),
    ],
)
def test_what_cannot_change_is_not_advised(copied: Path, fails: Fails, options: list[str], says: str) -> None:
    command = ["train", "--config", copied / "run.yaml", *options]
    for more in (
        [],
        ["--dry-run"],
        ["--allow-change", options[0][2:]],
        ["--allow-change", options[0][2:], "--dry-run"],
    ):
        error = fails(*command, *more)
        assert says in error and "--allow-change" not in error


@pytest.mark.parametrize(
    "options, says",
    [
        (["--data.paths=[{0}/none/*.txt]"], "{0}/none/*.txt"),
        (["--tokenizer.path", "{0}/none.model"], "{0}/none.model"),
        (["--run.dir", "{0}/run.yaml"], "is not a folder"),
        (["--run.dir", "{0}/run.yaml/below"], "is not a folder"),
    ],
)
def test_a_dry_run_refuses_what_train_refuses(copied: Path, fails: Fails, options: list[str], says: str) -> None:
    command = ["train", "--config", copied / "run.yaml", "--run.dir", copied / "fresh"]
    command += [option.format(copied) for option in options]
    error = fails(*command, "--dry-run")
    assert says.format(copied) in error and error == fails(*command)
    assert not (copied / "fresh").exists()


def test_a_dry_run_sees_damaged_checkpoints(copied: Path, fails: Fails) -> None:
    for folder in list_checkpoints(copied / "run"):
        (folder / "state.json").write_text("{}")
    assert "holds no checkpoint that can be used" in fails("train", "--config", copied / "run.yaml", "--dry-run")


@pytest.mark.parametrize("command", ["report", "eval", "generate", "inspect", "verify"])
def test_an_option_that_is_given_twice(finished: Path, fails: Fails, command: str) -> None:
    """Which of the two was meant?"""
    error = fails(command, "--run", finished / "run", "--run", finished / "none")
    assert error.startswith(f"--run is given twice, the second time as {finished}/none; write it once")
