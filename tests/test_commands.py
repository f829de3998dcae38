"""The commands on a run folder, as a user calls them."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from runs import short_config, small_config

from inrank_dist.commands.main import main
from inrank_dist.runtime import progress
from inrank_dist.train.checkpoint import list_checkpoints


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made by ``inrank train``, with validation on the whole split at its end."""
    folder = tmp_path_factory.mktemp("commands")
    config = small_config(corpus, run__dir=folder / "run", eval__interval=10, eval__sample_tokens=8)
    (folder / "config.yaml").write_text(config.to_yaml())
    assert main(["train", "--config", str(folder / "config.yaml"), "--checkpoint.interval", "15"]) == 0
    return folder / "run"


def records(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_the_run_folder_holds_what_the_contract_says(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        ".lock.1", "config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "report.html",
    }  # fmt: skip
    assert list((run / "tensorboard").glob("events.*"))
    steps = records(run, "step")
    assert [record["step"] for record in steps] == list(range(1, 31))
    assert {"loss", "tokens", "tokens_per_s", "data_wait", "lr", "grad_norm", "parameters"} < steps[0].keys()
    assert all(0 <= record["data_wait"] <= 1 for record in steps)
    assert steps[-1]["tokens"] == 30 * 8 * 16
    events = records(run, "rank_event")
    assert [event["action"] for event in events][-1] == "freeze"
    for event in events:
        for layer in event["layers"].values():
            assert {"from", "to", "explained", "null_rank"} == layer.keys() - {"found", "reached", "limit"}
            assert layer["null_rank"] >= 1
    assert len(records(run, "base_removed")) == 1
    assert records(run, "summary")[0]["parameters"] < records(run, "start")[0]["parameters_dense"]


def test_eval_repeats_the_validation_of_the_end(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--run", str(run)]) == 0
    out = capsys.readouterr().out
    loss = float(re.search(r"validation loss\s+([\d.]+)", out)[1])  # type: ignore[index]
    assert "bits per byte" in out
    assert loss == pytest.approx(records(run, "eval")[-1]["loss"], abs=1e-4)


def test_eval_knows_the_activation_between_the_factors(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = short_config(
        corpus, run__dir=tmp_path / "run", eval__interval=12, lowrank__mode="fixed", lowrank__base="none",
        lowrank__activation="silu",
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 0
    test_eval_repeats_the_validation_of_the_end(tmp_path / "run", capsys)


def test_the_command_goes_on_from_a_checkpoint_of_the_dense_phase(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = short_config(
        corpus, run__dir=tmp_path / "run", eval__interval=12, checkpoint__interval=3, checkpoint__keep=9,
        lowrank__mode="fixed", lowrank__base="none", lowrank__dense_fraction=0.5,
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    words = ["train", "--config", str(tmp_path / "config.yaml")]
    assert main(words) == 0
    whole = records(tmp_path / "run", "eval")[-1]["loss"]
    for step in (6, 9, 12):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:08d}")
    for command in ("inspect", "eval", "verify"):
        assert main([command, "--run", str(tmp_path / "run")]) == 0
    assert main([*words, "--dry-run"]) == 0
    assert main(words) == 0
    assert records(tmp_path / "run", "eval")[-1]["loss"] == whole


def test_eval_of_an_earlier_step_uses_the_fading_base(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Step 15 lies in the warm-up: the dense base still carries 9/24 of its weight."""
    assert main(["eval", "--run", str(run), "--step", "15"]) == 0
    early = float(re.search(r"validation loss\s+([\d.]+)", capsys.readouterr().out)[1])  # type: ignore[index]
    evals = {record["step"]: record["loss"] for record in records(run, "eval")}
    assert evals[10] > early > evals[20]


def test_inspect_shows_every_layer_beside_its_null_rank(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--run", str(run)]) == 0
    out = capsys.readouterr().out
    summary = records(run, "summary")[0]
    for name, layer in summary["ranks"].items():
        row = next(line for line in out.splitlines() if line.startswith(name)).split()
        assert row[1:4] == [str(layer["shape"][0]), "x", str(layer["shape"][1])]
        wanted = [layer["rank"], layer["found"], layer["rank"], layer["null_rank"]]  # frozen: as many modes as ranks
        assert [int(cell) for cell in row[4:8]] == wanted
        (explained,) = (r["layers"][name]["explained"] for r in records(run, "rank_check") if r["step"] == 24)
        # That of the rank so far, which the decision may have raised; or the freeze rounded down.
        events = [r["layers"] for r in records(run, "rank_event") if r["step"] == 24]
        rounded_down = any(name in each and each[name]["to"] < each[name]["from"] for each in events)
        assert float(row[8]) >= round(explained, 3) or rounded_down
        assert int(row[10]) == layer["rank"] * sum(layer["shape"])
    assert f"{summary['parameters']} parameters" in out


def test_generate_is_repeatable_and_continues_the_prompt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--run", str(run), "--prompt", "the rank", "--tokens", "12"]
    texts = []
    for seed in ("0", "0", "1"):
        assert main([*words, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("the rank") for text in texts)
    assert main([*words, "--temperature", "0", "--samples", "2"]) == 0
    first, second = capsys.readouterr().out.split("-" * 40)
    assert first.strip() == second.strip()


def test_report_is_one_page_without_anything_from_outside(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    assert main(["report", "--run", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert capsys.readouterr().out.strip() == str(run / "report.html")

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            assert tag not in ("link", "img", "iframe")
            assert not [
                value for name, value in attributes if name in ("src", "href") and not (value or "").startswith("#")
            ]

    Links().feed(page)
    assert "null rank" in page


def test_train_again_says_that_it_is_complete_and_more_steps_go_on(
    run: Path, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = str(run.parent / "config.yaml")
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["train", "--config", config]) == 0
    assert "complete at step 30" in caplog.text
    assert (run / "metrics.jsonl").read_bytes() == before
    more = ["train", "--config", config, "--train.steps", "33"]
    assert main(more) == 2  # another learning rate at every step: only if that is meant
    assert main([*more, "--allow-change", "train.steps", "--log.interval", "2", "--checkpoint.async", "true"]) == 0
    for line in ("train.steps was 30 up to step 30, now it is 33", "log.interval was 1 up to step 30, now it is 2"):
        assert line in caplog.text
    assert [record["step"] for record in records(run, "resume")] == [30]
    assert [record["step"] for record in records(run, "step")] == [*range(1, 31), 32, 33]
    assert list_checkpoints(run)[-1].name == "step-00000033"


def test_prepare_says_where_the_data_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--config", str(run.parent / "config.yaml")]) == 0
    out = capsys.readouterr().out
    folder = Path(re.search(r"folder\s+(\S+)", out)[1])  # type: ignore[index]
    assert folder.is_dir()
    assert "unigram entropy" in out


def test_the_published_choices_find_the_null_rank(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Product with its random start, variance, random new modes: ranks of factors that have learned next to nothing,
    and the run says so by itself. It converges in about a dozen checks, inside the learning rate's warm-up."""
    config = small_config(
        corpus, run__dir=tmp_path / "run", model__hidden_size=192, lowrank__targets="[mlp]", lowrank__initial_rank=2,
        lowrank__buffer=24, lowrank__threshold=0.9, lowrank__criterion="variance", lowrank__measure="product",
        lowrank__base="none", lowrank__init="kaiming", lowrank__growth_init="published", lowrank__interval=2,
        optimizer__lr=6e-4, schedule__warmup_steps=25, checkpoint__interval=0,
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 0
    assert "no more than it finds on untrained factors" in capsys.readouterr().out
    assert main(["inspect", "--run", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "in 4 of 4 layers the rank found is the null rank within 2%" in out
    for layer in records(tmp_path / "run", "summary")[0]["ranks"].values():
        assert layer["rank"] > 40


PROGRESS = {
    "verify": ["hashing {newest}", "hashing {oldest}"],
    "eval": ["hashing {newest}", "reading {newest}", "validating"],
    "generate": ["reading {newest}", "sampling"],
    "inspect": ["measuring the spectra"],
    "export": ["hashing {newest}", "writing the weights"],
    "report": ["drawing the report of {run}"],
    "compare": ["reading the runs", "drawing the comparison"],
}
"""Command -> activities that take long for a large run."""


@pytest.mark.usefixtures("progress_is_on")
@pytest.mark.parametrize("command", PROGRESS)
def test_long_work_is_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, command: str
) -> None:
    """As it would be if each part took longer than two seconds."""
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    words = ["--run", str(run)]
    if command == "compare":
        shutil.copytree(run, tmp_path / "other")
        words = [str(run), str(tmp_path / "other"), "--output", str(tmp_path / "page.html")]
    elif command == "export":
        words += ["--output", str(tmp_path / "exported"), "--format", "factors"]
    assert main([command, *words]) == 0
    told = [record.getMessage() for record in caplog.records if record.name == "inrank_dist.progress"]
    oldest, *_, newest = (folder.name for folder in list_checkpoints(run))
    for activity in PROGRESS[command]:
        named = activity.format(run=run, oldest=oldest, newest=newest)
        assert f"{named} ..." in told and any(line.startswith(f"{named}: done in ") for line in told)


@pytest.mark.usefixtures("progress_is_on")
def test_a_training_tells_what_is_not_a_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    settings = {"run__dir": tmp_path / "run", "eval__interval": 6, "checkpoint__interval": 6}
    (tmp_path / "config.yaml").write_text(short_config(corpus, **settings).to_yaml())
    words = ["train", "--config", str(tmp_path / "config.yaml")]
    assert main(words) == 0
    shutil.rmtree(list_checkpoints(tmp_path / "run")[-1])
    assert main(words) == 0
    told = {record.getMessage() for record in caplog.records if record.name == "inrank_dist.progress"}
    activities = ("building the model", "validating", "drawing the report", "hashing step-00000006")
    for activity in (*activities, "reading step-00000006"):
        assert f"{activity} ..." in told
    assert any(line.startswith("writing ") for line in told)
