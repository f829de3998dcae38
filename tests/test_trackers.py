"""Experiment trackers: what reaches them, also after a resume, and that no trouble of theirs reaches the training."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import Fails, small_config
from tracker_checks import Closed, Environment, Failing, FileTracker, Hanging, Killed, told

from inrank_dist.config import load_config
from inrank_dist.runtime.errors import UserError
from inrank_dist.train.monitors import JsonlMonitor, Monitors
from inrank_dist.train.trackers import TRACKERS, Tracker, check_installed, processes
from inrank_dist.train.trackers.processes import RunTrackers
from inrank_dist.train.trackers.tracker import state_path

LAYERS = {"up": {"from": 1, "to": 3, "found": 3, "null_rank": 2, "explained": 0.9}}


def step(number: int, loss: float = 1.0) -> dict[str, Any]:
    return {"kind": "step", "step": number, "loss": loss, "lr": 0.1, "grad_norm": float("nan")}


def event(number: int) -> dict[str, Any]:
    return {"kind": "rank_event", "step": number, "action": "grow", "layers": LAYERS}


SAMPLE = {"kind": "sample", "step": 3, "prompt": "It", "text": " was <b>"}
SUMMARY = {"kind": "summary", "step": 3, "train_loss": 1.0, "parameters": 10, "ranks": {"up": {"rank": 3}}}

Begin = Callable[..., Monitors]


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens the monitors of a run in ``tmp_path`` with trackers of these classes, as the command does: a new run, or
    one that goes on from the checkpoint of step ``at``."""
    opened = []

    def open_monitors(*kinds: type[Tracker], at: int = 0, **changes: Any) -> Monitors:
        for kind in kinds:
            monkeypatch.setitem(TRACKERS, kind.__name__, kind)
        names = [kind.__name__ for kind in kinds]
        (tmp_path / "config.yaml").write_text(small_config(tmp_path, log__trackers=names, **changes).to_yaml())
        metrics = JsonlMonitor(tmp_path / "metrics.jsonl")
        metrics.truncate_after(at)
        monitors = Monitors([metrics, RunTrackers(names, tmp_path, resumes=at > 0)])
        opened.append(monitors)
        return monitors

    yield open_monitors
    for monitors in opened:
        monitors.close()


def write(monitors: Monitors, *records: dict[str, Any]) -> None:
    for record in records:
        monitors.write(record)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state(run: Path, kind: type[Tracker] = FileTracker) -> dict[str, Any]:
    return dict(json.loads(state_path(run, kind.__name__).read_text()))


def test_a_tracker_receives_what_tensorboard_does(tmp_path: Path, begin: Begin) -> None:
    monitors = begin(FileTracker, log__project="novels", run__name="mine")
    write(monitors, {"kind": "start", "ranks": {"up": 1}}, step(1), event(1), step(2), SAMPLE, SUMMARY)
    monitors.close()
    opened, *logged, closed = told(tmp_path)
    assert (opened["name"], opened["project"], opened["new"]) == ("mine", "novels", True)
    assert opened["config"]["lowrank"]["threshold"] == 0.995 and opened["config"]["run"]["seed"] == 0
    ranks = {"rank": 3, "null_rank": 2, "explained": 0.9}
    at_event = {f"weights/{tag}/up": value for tag, value in ranks.items()}
    at_event |= {f"train/mean_{tag}": value for tag, value in ranks.items()}
    assert [(each["step"], each["scalars"]) for each in logged] == [
        (1, {"train/loss": 1, "train/lr": 0.1}),
        (1, at_event),
        (2, {"train/loss": 1, "train/lr": 0.1}),
        (3, {}),
        (3, {"train/parameters": 10}),
    ]
    assert logged[3]["texts"] == {"sample": "    It was <b>"}
    assert "| `up` | 3 | 3 | 2 | 0.900 |" in logged[4]["texts"]["rank_table"]
    assert closed == {"event": "close", "finished": True}


def test_a_resumed_run_goes_on_and_no_step_comes_twice(tmp_path: Path, begin: Begin) -> None:
    monitors = begin(FileTracker)
    write(monitors, step(1), event(1), step(2), step(3))
    monitors.close()
    monitors = begin(FileTracker, at=1)
    write(monitors, {"kind": "resume", "step": 1}, step(2), step(3), event(3), step(4))
    monitors.close()
    first, second = told(tmp_path, "open")
    assert first["id"] == second["id"] and not second["new"]
    logged = [(each["step"], "weights/rank/up" in each["scalars"]) for each in told(tmp_path, "log")]
    assert logged == [(1, False), (1, True), (2, False), (3, False), (3, True), (4, False)]
    assert [each["finished"] for each in told(tmp_path, "close")] == [False, False]


def test_what_was_missed_comes_at_the_next_start(tmp_path: Path, begin: Begin) -> None:
    """Also what was never sent: the tracker is new, was away, or its process was killed with the job."""
    monitors = begin()
    write(monitors, {"kind": "start", "ranks": {"up": 1}}, step(1), step(2), event(2))
    monitors.close()
    monitors = begin(FileTracker, at=2)
    write(monitors, step(3))
    monitors.close()
    assert [each["step"] for each in told(tmp_path, "log")] == [1, 2, 2, 3]


def test_a_run_that_starts_anew_is_a_new_run_in_the_tracker(tmp_path: Path, begin: Begin) -> None:
    for _ in range(2):
        monitors = begin(FileTracker)
        write(monitors, step(1))
        monitors.close()
    first, second = told(tmp_path, "open")
    assert first["id"] != second["id"] and first["new"] and second["new"]
    assert [each["step"] for each in told(tmp_path, "log")] == [1, 1]


@pytest.mark.parametrize(("kind", "reason"), [(Failing, "the network is away"), (Killed, "exit status -9; see ")])
def test_a_tracker_that_fails_is_given_up_with_one_warning(
    tmp_path: Path, begin: Begin, caplog: pytest.LogCaptureFixture, kind: type[Tracker], reason: str
) -> None:
    monitors = begin(kind, FileTracker)
    write(monitors, step(1), step(2))
    until(lambda: monitors.write(step(3)) or caplog.records)
    write(monitors, step(4), step(5))
    monitors.close()
    (warning,) = caplog.records
    assert warning.getMessage().startswith(f"warning: {kind.__name__} is written to no more ({reason}")
    if kind is Failing:
        assert state(tmp_path, kind)["sent"] == {"step": 1}, "what was sent is not sent again"
    assert told(tmp_path, "log")[-1]["step"] == 5


def test_a_tracker_that_cannot_be_opened_stops_a_new_run_only(
    tmp_path: Path, begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        UserError, match=r"Closed, which cannot be opened \(no server at that address\); see .*Closed\.log"
    ):
        begin(FileTracker, Closed)
    assert told(tmp_path)[-1] == {"event": "close", "finished": False}
    monitors = begin(FileTracker, Closed, at=1)
    caplog.clear()
    until(lambda: monitors.write(step(1)) or caplog.records)
    assert "Closed is written to no more (no server at that address)" in caplog.text


@pytest.mark.slow
def test_a_tracker_that_does_not_end_is_stopped_with_its_helpers(
    tmp_path: Path, begin: Begin, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", 3.0)
    monitors = begin(Hanging)
    write(monitors, step(1))
    until(lambda: told(tmp_path, "log"))
    monitors.close()
    assert "Hanging was not done within 3 s and was stopped" in caplog.text
    (hung,) = told(tmp_path, "hangs")
    until(lambda: not psutil.pid_exists(hung["helper"]) or psutil.Process(hung["helper"]).status() == "zombie")
    assert not psutil.pid_exists(hung["process"])


def test_a_killed_job_leaves_a_whole_run_and_no_process(tmp_path: Path, begin: Begin) -> None:
    """The tracker's process notices, writes what metrics.jsonl has, and ends by itself."""
    begin().close()  # writes the configuration
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tracker_checks import FileTracker\n"
        "from inrank_dist.train.monitors import JsonlMonitor\n"
        "from inrank_dist.train.trackers import TRACKERS\n"
        "from inrank_dist.train.trackers.processes import RunTrackers\n"
        "TRACKERS['FileTracker'] = FileTracker\n"
        "run = Path(sys.argv[1])\n"
        "trackers = RunTrackers(['FileTracker'], run, resumes=False)\n"
        "JsonlMonitor(run / 'metrics.jsonl').write({'kind': 'step', 'step': 1, 'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    until(lambda: told(tmp_path)[-1]["event"] == "close")
    assert [each["step"] for each in told(tmp_path, "log")] == [1]
    process = int(told(tmp_path, "open")[0]["id"].removeprefix("run-"))
    until(lambda: not psutil.pid_exists(process) or psutil.Process(process).status() == "zombie")


def test_a_signal_to_all_processes_does_not_end_the_tracker(tmp_path: Path, begin: Begin) -> None:
    """Slurm sends SIGTERM to every process of a job; the run still has a checkpoint and records to write."""
    monitors = begin(FileTracker)
    process = psutil.Process(int(state(tmp_path)["id"].removeprefix("run-")))
    assert os.getpgid(process.pid) != os.getpgid(0)  # nor does Ctrl-C reach it
    process.terminate()
    write(monitors, step(1))
    monitors.close()
    assert [each["event"] for each in told(tmp_path)] == ["open", "log", "close"]


def test_the_environment_of_the_user_comes_first(tmp_path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_MODE", "mine")
    begin(Environment).close()
    (found,) = told(tmp_path, "environment")
    assert (found["TEST_MODE"], found["TEST_TELEMETRY"]) == ("mine", "off")
    assert "TEST_TELEMETRY" not in os.environ


@pytest.mark.parametrize("name", ["wandb", "mlflow", "aim"])
def test_a_missing_package_is_told_before_anything_is_prepared(
    tmp_path: Path, corpus: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as Python does for what cannot be imported
    config = small_config(corpus, run__dir=tmp_path / "run", data__cache_dir=tmp_path / "cache")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    error = fails("train", "--config", tmp_path / "config.yaml", "--log.trackers", f"[{name}]")
    assert error == (
        f"log.trackers has {name}, but the package {name} is not installed; pip install {name}, or write "
        "log.trackers without it"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_a_folder_of_the_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights & Biases leaves a folder ``wandb`` where it runs."""
    (tmp_path / "absent").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(FileTracker, "package", "absent")
    monkeypatch.setitem(TRACKERS, "FileTracker", FileTracker)
    with pytest.raises(UserError, match="the package absent is not installed"):
        check_installed(["FileTracker"])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[tensorboard]", "log.trackers is [tensorboard]; write a list of wandb, mlflow, aim, such as [wandb]"),
        ("wandb", "log.trackers is wandb; write [wandb]"),
        ("[wandb,wandb]", "log.trackers names wandb twice; write it once"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, fails: Fails, value: str, said: str) -> None:
    config = small_config(tmp_path)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert fails("train", "--config", tmp_path / "config.yaml", "--log.trackers", value) == said


def test_the_settings_may_change_and_a_project_without_a_tracker_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(small_config(tmp_path).to_yaml())
    config, given = load_config(tmp_path / "config.yaml", ["--log.project", "novels"])
    assert config.without_effect(given) == ["log.project has no effect: log.trackers is []"]
    assert type(config.log).ON_RESUME.is_free("trackers") and type(config.log).ON_RESUME.is_free("project")
