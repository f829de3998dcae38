"""One job at a time in a run folder, and what is in it is never taken for nothing."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from faults import Fault
from faults.launch import Job, launch
from runs import Fails, small_config, the_error

from inrank_dist.train import run_folder
from inrank_dist.train.checkpoint import list_checkpoints, step_of

STEPS = 12


def words(folder: Path, corpus: Path, **changes: Any) -> list[object]:
    """The command line of a short run in ``folder``."""
    settings = {"train__steps": STEPS, "lowrank__warmup_steps": 8, "lowrank__interval": 4, "checkpoint__interval": 4}
    config = small_config(corpus, run__dir=folder / "run", **settings | changes)
    (folder / "config.yaml").write_text(config.to_yaml())
    return ["train", "--config", folder / "config.yaml"]


def steps_in_metrics(folder: Path) -> list[int]:
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if record["kind"] == "step"]


@pytest.fixture
def paused(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A job that stands still until ``fired.go`` is there, by default at step 6; a second one does not wait for it."""
    monkeypatch.setattr(run_folder, "WAIT_SECONDS", 0.0)
    jobs = []

    def start(phase: str = "forward", step: int | None = 6) -> Job:
        fault = Fault("pause", 0, step, phase, str(tmp_path / "fired"))
        job = Job(words(tmp_path, corpus), tmp_path / "job", world_size=1, fault=fault)
        jobs.append(job)
        job.wait_until((tmp_path / "fired").exists)
        return job

    yield start
    for job in jobs:
        job.end()


def go_on(folder: Path) -> None:
    (folder / "fired.go").touch()


def test_a_second_job_is_told_who_is_in_the_folder(tmp_path: Path, corpus: Path, paused: Any, fails: Fails) -> None:
    job = paused()
    error = fails(*words(tmp_path, corpus))
    assert f"in use by process {job.processes[0].pid} on {os.uname().nodename} since " in error
    assert str(tmp_path / "run") in error and "write another run.dir" in error
    go_on(tmp_path)
    (ended,) = job.wait()
    assert ended.status == 0, ended
    assert steps_in_metrics(tmp_path) == list(range(1, STEPS + 1))
    assert [step_of(folder) for folder in list_checkpoints(tmp_path / "run")] == [8, 12]


def test_a_killed_job_is_in_nobodys_way(tmp_path: Path, corpus: Path, paused: Any) -> None:
    paused().end()
    (ended,) = launch(words(tmp_path, corpus), tmp_path / "again", world_size=1)
    assert ended.status == 0, ended
    assert steps_in_metrics(tmp_path) == list(range(1, STEPS + 1))


def test_two_jobs_that_both_saw_no_folder(tmp_path: Path, corpus: Path, paused: Any) -> None:
    first = paused("prepare", None)
    (second,) = launch(words(tmp_path, corpus), tmp_path / "second", world_size=1)
    assert second.status == 0, second
    go_on(tmp_path)
    (ended,) = first.wait()
    assert "another job has trained meanwhile" in the_error(ended.status, ended.output)
    assert steps_in_metrics(tmp_path) == list(range(1, STEPS + 1))


def test_a_job_whose_folder_was_taken_over_writes_no_more(tmp_path: Path, corpus: Path, paused: Any) -> None:
    job = paused()
    before = sorted(tmp_path.glob("run/checkpoints/*")), (tmp_path / "run/metrics.jsonl").read_bytes()
    shutil.copy(tmp_path / "run/.lock.1", tmp_path / "run/.lock.2")  # as a job on another machine does it
    go_on(tmp_path)
    (ended,) = job.wait()
    last = ended.output.splitlines()[-1]
    assert ended.status == 2 and last.startswith("error: ") and "was taken over by process" in last, ended
    assert before == (sorted(tmp_path.glob("run/checkpoints/*")), (tmp_path / "run/metrics.jsonl").read_bytes())
