"""Weights & Biases, MLflow and Aim without a network: their own readers find what was written."""

import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from faults import Fault
from faults.launch import Job, launch
from runs import small_config
from sharing import nightly
from test_trackers import SAMPLE, SUMMARY, event, step
from tracker_checks import Found, found_in

from inrank_dist.train.monitors import JsonlMonitor, Monitors, read_metrics
from inrank_dist.train.trackers import TRACKERS, processes
from inrank_dist.train.trackers.processes import RunTrackers

pytestmark = pytest.mark.slow  # each of them takes seconds to import and to make its store


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing leaves this machine. A busy one gets more time."""
    monkeypatch.setattr(processes, "STOP_SECONDS", 80.0)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("AIM_REPO", str(tmp_path / "aim"))
    monkeypatch.chdir(tmp_path)  # MLflow's artifacts


def installed() -> list[str]:
    return [name for name in TRACKERS if find_spec(name)]


def write(run: Path, name: str, *records: dict[str, Any], at: int = 0, **changes: Any) -> Found:
    """Write records of a new run, or of one that goes on from step ``at``; what the tracker then holds."""
    run.mkdir(exist_ok=True)
    config = small_config(run, run__name="mine", log__project="novels", log__trackers=[name], **changes)
    (run / "config.yaml").write_text(config.to_yaml())
    metrics = JsonlMonitor(run / "metrics.jsonl")
    metrics.truncate_after(at)
    monitors = Monitors([metrics, RunTrackers([name], run, resumes=at > 0)])
    for record in records:
        monitors.write(record)
    monitors.close()
    return found_in(name, run)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "aim"])
def test_a_run_and_its_resumption_are_one_run_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    pytest.importorskip(name)
    run = tmp_path / "run"
    start = {"kind": "start", "step": 0, "ranks": {"blocks.0.mlp.up": 1}}
    found = write(run, name, start, step(1, 5.0), event(1), step(2, 4.0), step(3, 3.0))
    assert found.scalars["train/loss"] == [(1, 5.0), (2, 4.0), (3, 3.0)]
    assert found.scalars["weights/rank/up"] == [(1, 3)] and found.scalars["weights/null_rank/up"] == [(1, 2)]
    assert "train/grad_norm" not in found.scalars  # not finite
    assert found.settings["optimizer.lr"] == "0.003" and found.settings["lowrank.targets"] in ("['all']", "[all]")
    assert found.status in (None, "1", "KILLED")
    again = [step(2, 4.5), step(3, 3.5), step(4, 2.0), {**SAMPLE, "step": 4}, {**SUMMARY, "step": 4}]
    found = write(run, name, *again, at=1, optimizer__lr=0.001)
    assert found.scalars["train/loss"] == [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0)]
    assert found.scalars["train/parameters"] == [(4, 10)]
    ((at, sample),) = found.texts["sample"]
    assert at == 4 and sample.replace("&lt;", "<").replace("&gt;", ">").count("    It was <b>") == 1
    assert all("| `up` | 3 | 3 | 2 | 0.900 |" in text for _, text in found.texts["rank_table"])
    assert found.settings["optimizer.lr"] == "0.001" and found.settings["run.name"] == "mine"
    assert found.status in (None, "0", "FINISHED")
    found = write(run, name, step(5), at=4)
    assert found.settings["optimizer.lr"] == "0.003" and found.scalars["train/loss"][-2:] == [(4, 2.0), (5, 1.0)]
    assert not caplog.records


@pytest.mark.parametrize("name", [nightly("mlflow"), "aim"])
def test_a_run_that_is_not_known_there_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip(name)
    write(tmp_path / "run", name, step(1), step(2))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    monkeypatch.setenv("AIM_REPO", str(tmp_path / "other"))
    found = write(tmp_path / "run", name, step(3), at=2)
    assert [at for at, _ in found.scalars["train/loss"]] == [1, 2, 3]


def test_a_store_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://x")
    with pytest.raises(ValueError, match=r"log\.trackers has mlflow, which cannot be opened") as error:
        write(tmp_path / "run", "mlflow", step(1))
    assert "\n" not in str(error.value)


def test_a_training_that_is_stopped_and_resumed_is_whole_in_all_of_them(tmp_path: Path, corpus: Path) -> None:
    """Two processes and the command line; SIGTERM in step 7."""
    names, run = installed(), tmp_path / "run"
    if not names:
        pytest.skip("no tracker is installed")
    settings: dict[str, Any] = {"lowrank__warmup_steps": 8, "lowrank__interval": 4, "eval__interval": 4}
    settings |= {"train__steps": 12, "checkpoint__interval": 4, "eval__sample_tokens": 8, "log__trackers": names}
    config = small_config(corpus, run__dir=run, **settings)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    words = ["train", "--config", tmp_path / "config.yaml"]
    fault = Fault("pause", 0, 7, "forward", str(tmp_path / "fired"))
    job = Job(words, tmp_path / "first", world_size=2, fault=fault)
    job.wait_until((tmp_path / "fired").exists)
    for process in job.processes:
        process.terminate()
    (tmp_path / "fired.go").touch()
    assert [ended.status for ended in job.wait()] == [75, 75]
    assert [ended.status for ended in launch(words, tmp_path / "second", world_size=2)] == [0, 0]
    records = read_metrics(run / "metrics.jsonl")
    losses = [(each["step"], each["loss"]) for each in records if each["kind"] == "step"]
    evaluations = [(each["step"], each["loss"]) for each in records if each["kind"] == "eval"]
    (summary,) = (each for each in records if each["kind"] == "summary")
    assert [at for at, _ in losses] == list(range(1, 13)) and [at for at, _ in evaluations] == [4, 8, 12]
    for name in names:
        found = found_in(name, run)
        assert found.scalars["train/loss"] == losses, name
        assert found.scalars["eval/loss"] == evaluations, name
        assert found.scalars["train/flops"][-1] == (12, summary["flops"]), name
        layer = next(iter(summary["ranks"]))
        assert found.scalars[f"weights/rank/{layer}"][-1][1] == summary["ranks"][layer]["rank"], name
        assert {"sample", "rank_table"} <= found.texts.keys(), name
        assert found.settings["train.steps"] == "12", name


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_aim_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """Aim takes older packages than the others, so the tools of development leave it out."""
    if find_spec("aim") or sys.version_info >= (3, 13):
        pytest.skip("Aim is here, or does not exist for this Python")
    venv.create(tmp_path / "venv", with_pip=True)
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (packages / "below.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "aim"], check=True)
    words = ["-m", "pytest", "-m", "slow and not nightly", "-p", "no:cacheprovider", "-k", "aim or training", __file__]
    ended = subprocess.run([python, *words], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert ended.returncode == 0 and "skipped" not in ended.stdout, ended.stdout
