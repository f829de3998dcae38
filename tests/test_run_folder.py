"""One job at a time in a run folder, and what is in it is never taken for nothing."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from faults import Fault
from faults.launch import Job, launch
from runs import Fails, small_config, the_error

from inrank_dist.commands.main import main
from inrank_dist.train import run_folder
from inrank_dist.train.checkpoint import list_checkpoints, step_of

pytestmark = pytest.mark.xdist_group("faults")  # beside the others whose processes are forked

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


@pytest.mark.slow
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


# Only "not there" means that there is no checkpoint.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    (ended,) = launch(words(folder, corpus), folder / "job", world_size=1)
    assert ended.status == 0, ended
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path, corpus: Path) -> Path:
    """A copy of it, to be spoilt; a command that goes on with it is ``words(copied, corpus, ...)``."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path


def everything(folder: Path) -> dict[str, bytes]:
    """Path -> content of every file, links not followed, the locks left out."""
    files = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return {str(file): file.read_bytes() for file in files if file.is_file() and ".lock." not in file.name}


def a_loop(checkpoints: Path) -> None:
    checkpoints.symlink_to(checkpoints)


def a_dangling_link(checkpoints: Path) -> None:
    checkpoints.symlink_to(checkpoints.with_name("moved away"))


def a_file(checkpoints: Path) -> None:
    checkpoints.write_text("")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (a_loop, "Too many levels of symbolic links"),
        (a_dangling_link, "No such file or directory"),
        (a_file, "Not a directory"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval", "verify", "inspect"])
def test_checkpoints_that_cannot_be_listed_are_not_none(
    copied: Path, corpus: Path, fails: Fails, spoil: Any, reason: str, command: str
) -> None:
    (copied / "run/checkpoints").rename(copied / "kept")
    spoil(copied / "run/checkpoints")
    argv = words(copied, corpus, train__steps=14)
    before = everything(copied)
    error = fails(*argv) if command == "train" else fails(command, "--run", copied / "run")
    assert f"{copied}/run/checkpoints" in error and f"cannot be read ({reason})" in error and "; fix that" in error
    assert everything(copied) == before


def test_a_folder_that_is_not_there_holds_no_checkpoint(copied: Path, corpus: Path) -> None:
    shutil.rmtree(copied / "run/checkpoints")
    (ended,) = launch(words(copied, corpus), copied / "again", world_size=1)
    assert ended.status == 0 and steps_in_metrics(copied) == list(range(1, STEPS + 1))


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's files take root to make")
@pytest.mark.parametrize("what", ["", "/step-00000012", "/step-00000012/state.json"])
def test_what_may_not_be_read_is_not_damaged(copied: Path, corpus: Path, what: str) -> None:
    """The newest checkpoint is sound, so neither is the one before it taken, nor does the run start anew."""
    argv = words(copied, corpus, data__cache_dir=copied / "cache", train__steps=14)
    open_to_others(copied)
    shutil.copytree(corpus / "corpus", copied / "corpus")
    hidden = copied / f"run/checkpoints{what}"
    hidden.chmod(0)
    before = everything(copied)
    job = [*argv, f"--data.paths=[{copied}/corpus/*.txt]", "--allow-change", "train.steps"]
    status, output = as_nobody(job, copied)
    assert str(hidden) in the_error(status, output) and "cannot be read (Permission denied)" in output
    assert everything(copied) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's files take root to make")
def test_the_report_of_a_run_that_cannot_be_written(copied: Path) -> None:
    open_to_others(copied)
    (copied / "run/report.html").unlink()
    (copied / "run").chmod(0o555)
    before = everything(copied)
    status, output = as_nobody(["report", "--run", copied / "run"], copied)
    error = the_error(status, output)
    assert f"{copied}/run/report.html cannot be written (Permission denied); write --output FILE" in error
    assert everything(copied) == before
    assert as_nobody(["report", "--run", copied / "run", "--output", copied / "a.html"], copied) == (0, "")
    assert "</html>" in (copied / "a.html").read_text()


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_the_report_of_a_run_that_cannot_be_read(copied: Path, fails: Fails, name: str) -> None:
    (copied / "run" / name).unlink()
    (copied / "run" / name).symlink_to(name)
    assert f"{name} cannot be read (Too many levels of symbolic links)" in fails("report", "--run", copied / "run")


def open_to_others(folder: Path) -> None:
    """Let other users in: pytest's folders above are its user's own, one more of them below pytest-xdist."""
    for place in (folder, *folder.parents):
        mode = place.stat().st_mode
        if mode & 0o005 != 0o005:
            place.chmod(mode | 0o055)


def as_nobody(argv: list[object], folder: Path) -> tuple[int, str]:
    """Run a command as a user whom the run folder belongs to, but who may not read all of it."""
    # That user may not be able to import what is not loaded yet, as where Python lives in root's home. So this process,
    # to which nothing is forbidden, does the same before, and the folder is put back as it was.
    kept = folder.with_name(f"{folder.name}-kept")
    shutil.copytree(folder, kept)
    main([str(word) for word in argv])
    shutil.rmtree(folder)
    kept.rename(folder)
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.chown(Path(place) / name, 65534, 65534, follow_symlinks=False)
    os.chown(folder, 65534, 65534)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        with os.fdopen(write, "w") as sys.stderr:
            status = main([str(word) for word in argv])
        os._exit(status)
    os.close(write)
    with os.fdopen(read) as output:
        text = output.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text
