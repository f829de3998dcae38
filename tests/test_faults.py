"""Whatever happens to a process, the run goes on afterwards as if nothing had: bit for bit, in real processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from faults import Fault
from faults.launch import Ended, Job, launch
from runs import bytes_of, small_config, tensor_bytes
from sharing import nightly, slow

from inrank_dist.data.corpus import _load
from inrank_dist.runtime.stop import Stopped, StopRequest
from inrank_dist.runtime.watch import exit_message
from inrank_dist.train.checkpoint import list_checkpoints, named_folders, open_checkpoint, step_of

pytestmark = pytest.mark.xdist_group("faults")  # one server, from which all processes are forked

STEPS, EVENTS = 40, (6, 12, 18, 24, 30)

CHANGES: dict[str, Any] = {
    "model__num_layers": 1,
    "train__steps": STEPS,
    "lowrank__interval": 6,
    "lowrank__warmup_steps": 30,
    "lowrank__threshold": 0.999999999,  # every layer grows at every event
    "model__dropout": 0.1,
    "parallel__engine": "fsdp",
    "checkpoint__interval": 3,
    "eval__interval": 10,
    "eval__batches": 2,
    "train__micro_batch_size": 4,
}
"""Forty steps of one block with four growth events and the freeze, on two processes."""

LATER = (
    *("seconds", "tokens_per_s", "data_wait", "peak_memory", "resident_memory"),
    *("mfu", "mfu_dense", "peak_flops", "time"),
)
"""What differs from run to run and from machine to machine."""


def words(folder: Path, corpus: Path, **changes: Any) -> list[object]:
    """The command line of a run in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = small_config(corpus, run__dir=folder / "run", **CHANGES | changes)
    (folder / "config.yaml").write_text(config.to_yaml())
    return ["train", "--config", folder / "config.yaml"]


def statuses(ended: list[Ended]) -> list[int]:
    return [each.status for each in ended]


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs, with a checkpoint of every third step."""
    return undisturbed(corpus, tmp_path_factory.mktemp("straight"))


def undisturbed(corpus: Path, folder: Path, **changes: Any) -> Path:
    """A run that nothing disturbs."""
    ended = launch(words(folder, corpus, checkpoint__keep=STEPS, **changes), folder, world_size=2)
    assert statuses(ended) == [0, 0], ended
    events = [r for r in records(folder) if r["kind"] == "rank_event"]
    assert [(r["step"], r["action"]) for r in events] == [(s, "freeze" if s == 30 else "grow") for s in EVENTS]
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    """The metrics that say what was computed."""
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    kept = ("step", "eval", "rank_event", "rank_check", "stable_ranks", "base_removed", "skipped", "summary")
    return [{k: v for k, v in r.items() if k not in LATER} for r in lines if r["kind"] in kept]


def samples(folder: Path) -> dict[tuple[int, int], list[int]]:
    """Process and position in the order of samples -> samples; a step that was done twice saw the same."""
    seen: dict[tuple[int, int], list[int]] = {}
    for rank in range(2):
        for line in (folder / f"samples-{rank}.jsonl").read_text().splitlines():
            position, ids = json.loads(line)
            assert seen.setdefault((rank, position), ids) == ids
    return seen


def assert_the_same_run(folder: Path, straight: Path) -> None:
    """Weights, moments, metrics, samples and state are those of the undisturbed run."""
    ours, theirs = (open_checkpoint(list_checkpoints(each / "run")[-1]) for each in (folder, straight))
    assert ours.state.step == theirs.state.step == STEPS
    assert {**vars(ours.state), "seconds": 0} == {**vars(theirs.state), "seconds": 0}
    assert tensor_bytes(folder / "run") == tensor_bytes(straight / "run")
    assert records(folder) == records(straight)
    whole = samples(straight)
    assert all(whole[place] == ids for place, ids in samples(folder).items())
    assert not list((folder / "run/checkpoints").glob("tmp-*"))


def as_it_was(straight: Path, folder: Path, step: int) -> None:
    """The run folder as it was before ``step``, from its last checkpoint and its metrics."""
    before = [f for f in list_checkpoints(straight / "run") if step_of(f) < step]
    for checkpoint in before[-1:]:
        shutil.copytree(checkpoint, folder / "run/checkpoints" / checkpoint.name)
    if before:
        shutil.copy(straight / "run/metrics.jsonl", folder / "run/metrics.jsonl")


PHASES = ("forward", "backward", "optimizer", "save-data", "save-commit", "retention", "evaluation")
AT_EVENTS = ("decision", "reshape")


def fault_at(step: int, folder: Path, action: str = "kill") -> Fault:
    """A fault at a step, in a phase that comes at that step or soon after it."""
    phases = AT_EVENTS if step in EVENTS else PHASES
    phase = phases[(step // 6 if step in EVENTS else step) % len(phases)]
    exact = phase in ("forward", "backward", "optimizer", "decision", "reshape")
    process = 0 if phase in ("save-commit", "retention") else step % 2
    return Fault(action, process, step if exact else None, phase, str(folder / "fired"))


@pytest.mark.nightly
@pytest.mark.parametrize("step", range(1, STEPS))
def test_killed_at_every_step(corpus: Path, straight: Path, tmp_path: Path, step: int) -> None:
    """SIGKILL to one of two processes at every step, in one phase after another; every fourth run is killed twice."""
    killed_and_resumed(corpus, straight, tmp_path, step)


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_killed_at_random_steps(corpus: Path, tmp_path: Path, engine: str) -> None:
    """Ten of them, with DeepSpeed."""
    straight = undisturbed(corpus, tmp_path / "straight", parallel__engine=engine)
    for step in Random(0).sample(range(1, STEPS), 10):
        killed_and_resumed(corpus, straight, tmp_path / str(step), step, parallel__engine=engine)


def chained_fault(step: int, folder: Path) -> Fault:
    """A kill exactly at a step: in its rank event, its evaluation or its save where there is one, else in the next
    step."""
    if step in EVENTS:
        phase = AT_EVENTS[step // 6 % 2]
    elif step % 10 == 0:
        phase = "evaluation"
    elif step % 3 == 0:
        phase = ("save-data", "retention", "save-commit")[(step // 3 - 1) // 2 % 3]
    else:
        phase = ("forward", "backward", "optimizer")[step // 2 % 3]
    process = 0 if phase in ("save-commit", "retention") else step % 2
    return Fault("kill", process, step, phase, str(folder / f"fired {step}"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("engine", "steps"),
    [
        slow("fsdp", (1, 2, 3, 6, 9, 12, 15, 20, 24, 27, 30, 35)),  # each phase at least once
        nightly("zero2", (5, 12, 21, 30)),
        nightly("fsdp", range(1, STEPS)),
        nightly("zero3", (6, 15, 20, 24)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} times",
)
def test_one_run_killed_again_and_again(corpus: Path, tmp_path: Path, engine: str, steps: Sequence[int]) -> None:
    """Killed at step 1, resumed, killed at step 2, and so on; every checkpoint on the way is the undisturbed run's."""
    straight = undisturbed(corpus, tmp_path / "straight", parallel__engine=engine)
    command = words(tmp_path, corpus, parallel__engine=engine)
    compared = set()
    for step in steps:
        fault = chained_fault(step, tmp_path)
        ended = launch(command, tmp_path, world_size=2, fault=fault)
        assert statuses(ended)[fault.process] == -signal.SIGKILL, (fault, ended)
        assert statuses(ended)[1 - fault.process] == 1
        for checkpoint in list_checkpoints(tmp_path / "run"):
            if checkpoint.name not in compared:
                assert bytes_of(checkpoint) == bytes_of(straight / "run/checkpoints" / checkpoint.name), fault
                compared.add(checkpoint.name)
    assert statuses(launch(command, tmp_path, world_size=2)) == [0, 0]
    assert_the_same_run(tmp_path, straight)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", nightly("zero3")])
def test_killed_before_in_and_after_the_factorisation_of_dense_layers(
    corpus: Path, tmp_path: Path, engine: str
) -> None:
    """In the step that it follows, within it, and in the next one; stable ranks are measured at steps 4, 8 and 12."""
    dense: dict[str, Any] = {
        "parallel__engine": engine, "lowrank__mode": "fixed", "lowrank__base": "none", "lowrank__dense_fraction": 0.3,
        "lowrank__dense_until": "stable_rank", "lowrank__interval": 4, "lowrank__stable_rank_tolerance": 0,
    }  # fmt: skip
    straight = tmp_path / "straight"
    ended = launch(words(straight, corpus, checkpoint__keep=STEPS, **dense), straight, world_size=2)
    assert statuses(ended) == [0, 0], ended
    assert [(r["step"], r["action"]) for r in records(straight) if r["kind"] == "rank_event"] == [(12, "factorise")]
    assert [r["step"] for r in records(straight) if r["kind"] == "stable_ranks"] == [4, 8, 12]
    command = words(tmp_path, corpus, checkpoint__keep=STEPS, **dense)
    for phase, step, process in (("optimizer", 11, 0), ("reshape", 12, 1), ("forward", 12, 0)):
        fault = Fault("kill", process, step, phase, str(tmp_path / f"fired {phase}"))
        ended = launch(command, tmp_path, world_size=2, fault=fault)
        assert statuses(ended)[process] == -signal.SIGKILL, (fault, ended)
    assert statuses(launch(command, tmp_path, world_size=2)) == [0, 0]
    assert_the_same_run(tmp_path, straight)


def killed_and_resumed(corpus: Path, straight: Path, folder: Path, step: int, **changes: Any) -> None:
    """Kill one of two processes at a step, and let the job go on; every fourth is killed twice."""
    folder.mkdir(exist_ok=True)
    as_it_was(straight, folder, step)
    command = words(folder, corpus, **changes)
    for again in range(2 if step % 4 == 0 else 1):
        fault = fault_at(step, folder) if not again else Fault("kill", 0, None, "backward", str(folder / "again"))
        ended = launch(command, folder, world_size=2, fault=fault)
        assert statuses(ended)[fault.process] == -signal.SIGKILL, (fault, ended)
        assert statuses(ended)[1 - fault.process] == 1
        assert f"process {1 - fault.process} lost another process" in ended[1 - fault.process].output
    assert statuses(launch(command, folder, world_size=2)) == [0, 0]
    assert_the_same_run(folder, straight)


def test_killed_and_resumed(corpus: Path, straight: Path, tmp_path: Path) -> None:
    """One of the cases above, for every day: within a rank event, and then again."""
    killed_and_resumed(corpus, straight, tmp_path, step=24)


@pytest.mark.parametrize(
    ("phase", "step", "changes"),
    [
        pytest.param("backward", 8, {}, marks=pytest.mark.slow),
        pytest.param("evaluation", 10, {}, marks=pytest.mark.slow),
        ("reshape", 12, {}),
        pytest.param("save-data", None, {"checkpoint__async_": True}, marks=pytest.mark.slow),
        pytest.param("prepare", None, {"data__cache_dir": "cache"}, marks=pytest.mark.slow),
        nightly("evaluation", STEPS, {}),
        nightly("backward", 8, {"parallel__engine": "zero2"}),
        nightly("reshape", 12, {"parallel__engine": "zero3"}),
        nightly("prepare", None, {"data__cache_dir": "cache", "parallel__engine": "zero2"}),
    ],
)
def test_a_signal_to_one_process_stops_all_of_them(
    corpus: Path, straight: Path, tmp_path: Path, phase: str, step: int | None, changes: dict[str, Any]
) -> None:
    """In training, validation, a rank event, an asynchronous save, preparation: status 75, saved, exactly resumed."""
    if "parallel__engine" in changes:
        straight = undisturbed(corpus, tmp_path / "straight", parallel__engine=changes["parallel__engine"])
    changes = {key: tmp_path / value if key == "data__cache_dir" else value for key, value in changes.items()}
    changes = {key.removesuffix("_"): value for key, value in changes.items()}
    command = words(tmp_path, corpus, **changes)
    fault = Fault("signal", 1, step, phase, str(tmp_path / "fired"))
    ended = launch(command, tmp_path, world_size=2, fault=fault)
    assert statuses(ended) == [75, 75], ended
    assert "Traceback" not in ended[0].output + ended[1].output
    if phase == "prepare":
        assert "stopped before the training began; nothing is lost" in ended[0].output
        assert not (tmp_path / "run").exists()
    else:
        assert "the same command goes on from there" in ended[0].output
        saved = open_checkpoint(list_checkpoints(tmp_path / "run")[-1]).state
        assert saved.evaluation_due == (phase == "evaluation")
        assert step is None or saved.step in (step, step + 1)
    assert statuses(launch(command, tmp_path, world_size=2)) == [0, 0]
    assert_the_same_run(tmp_path, straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_other_signals_too(corpus: Path, tmp_path: Path, number: signal.Signals) -> None:
    """One process alone, asked from outside at any moment."""
    job = Job(words(tmp_path, corpus, parallel__engine="local", train__steps=100_000), tmp_path, world_size=1)
    job.wait_until(lambda: bool(list_checkpoints(tmp_path / "run")))
    os.kill(job.processes[0].pid or 0, number)
    (ended,) = job.wait()
    assert ended.status == 75, ended
    newest = open_checkpoint(list_checkpoints(tmp_path / "run")[-1])
    assert f"saved at step {newest.state.step}" in ended.output


@pytest.mark.parametrize("world_size", [slow(1), 2])
def test_a_process_without_a_safe_point_leaves_in_time(corpus: Path, tmp_path: Path, world_size: int) -> None:
    """A hang after a signal must not outlast the scheduler's patience: the last complete checkpoint stands. The process
    that gets the signal waits in C for the other one, where Python's own handlers do not run."""
    fault = Fault("hang", world_size - 1, 8, "forward", str(tmp_path / "fired"))
    command = words(tmp_path, corpus, parallel__engine="auto", checkpoint__grace_seconds=1.0)
    job = Job(command, tmp_path, world_size=world_size, fault=fault)
    job.wait_until(lambda: (tmp_path / "fired").exists())
    time.sleep(0.5)
    os.kill(job.processes[0].pid or 0, signal.SIGTERM)
    job.wait_until(lambda: job.processes[0].exitcode is not None)
    job.end()
    assert job.processes[0].exitcode == 1  # nothing was saved
    output = (tmp_path / "output-0.txt").read_text()
    assert "no safe point within checkpoint.grace_seconds 1 after SIGTERM" in output
    assert step_of(list_checkpoints(tmp_path / "run")[-1]) == 6


@pytest.mark.slow
def test_a_suspended_job_is_not_taken_for_a_hang(corpus: Path, tmp_path: Path) -> None:
    """Ctrl-Z and fg, a scheduler that suspends: nobody hangs."""
    fault = Fault("stop", 0, 8, "forward", str(tmp_path / "fired"))
    command = words(tmp_path, corpus, parallel__engine="local", parallel__step_timeout_seconds=4)
    job = Job(command, tmp_path, world_size=1, fault=fault)
    job.wait_until(lambda: (tmp_path / "fired").exists())
    time.sleep(6)  # longer than that
    os.kill(job.processes[0].pid or 0, signal.SIGCONT)
    (ended,) = job.wait()
    assert ended.status == 0, ended


@pytest.mark.slow
def test_a_process_killed_while_data_is_prepared_is_missed(corpus: Path, tmp_path: Path) -> None:
    """There is no collective yet that would notice."""
    fault = Fault("kill", 1, None, "prepare", str(tmp_path / "fired"))
    ended = Job(words(tmp_path, corpus), tmp_path, world_size=2, fault=fault).wait(100)
    assert statuses(ended) == [1, -signal.SIGKILL]
    assert "process 1 does not answer: it was killed or is stopped, or its machine" in ended[0].output


def test_a_request_that_came_early_is_passed_on() -> None:
    """A signal while the process group is still forming: the watch that tells the others is not there yet."""
    stop, told = StopRequest(), []
    stop.listen()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        stop.on_signal(told.append)
        assert told == ["SIGUSR1"]
        with pytest.raises(Stopped), stop.raising():
            pass
    finally:
        stop.signal = None  # else this process would ignore signals from now on
        stop.close()


def test_a_signal_while_text_is_read_is_no_error_in_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """``datasets`` takes whatever exception comes while it reads for one of its own, and fails while it cleans up."""

    def read(*_: Any, **__: Any) -> None:
        try:
            try:
                raise Stopped
            except Exception as error:
                raise ValueError("An error occurred while generating the dataset") from error
        finally:
            raise OSError("the file is not closed")

    monkeypatch.setattr("inrank_dist.data.corpus.load_dataset", read)
    with pytest.raises(Stopped):
        _load("the text cannot be read", "mend it")


@pytest.mark.parametrize(("local_rank", "says"), [("0", "error: it is wrong"), ("1", "")])
def test_a_mistake_that_one_process_finds_is_told_once_a_node(
    monkeypatch: pytest.MonkeyPatch, local_rank: str, says: str
) -> None:
    """A file that only one process cannot read."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert exit_message(0, (1, 2, "it is wrong")) == says


@pytest.mark.parametrize("phase", ["forward", slow("decision")])
def test_an_error_is_told_first_and_by_its_process(corpus: Path, tmp_path: Path, phase: str) -> None:
    """The others leave at once with one line; nobody waits for a timeout."""
    fault = Fault("raise", 1, 12, phase, str(tmp_path / "fired"))
    ended = launch(words(tmp_path, corpus), tmp_path, world_size=2, fault=fault)  # which waits less than any timeout
    assert statuses(ended) == [1, 1]
    assert "process 1 failed:" in ended[1].output
    assert ended[1].output.rstrip().endswith(f"faults.Injected: injected at step 12 in {phase}")
    assert f"process 0 leaves: process 1 failed (Injected: injected at step 12 in {phase})" in ended[0].output
    assert "Traceback" not in ended[0].output
    assert step_of(list_checkpoints(tmp_path / "run")[-1]) in (9, 12)


def test_a_process_that_hangs_is_named(corpus: Path, tmp_path: Path) -> None:
    """It says so itself, and leaves its stacks and the collectives of everyone."""
    fault = Fault("hang", 1, 8, "forward", str(tmp_path / "fired"))
    command = words(tmp_path, corpus, parallel__step_timeout_seconds=5)
    ended = launch(command, tmp_path, world_size=2, fault=fault)
    assert statuses(ended) == [1, 1], ended
    assert "process 1 hangs in step 9: no progress for " in ended[1].output
    assert "a longer parallel.step_timeout_seconds if it was only slow" in ended[1].output
    assert "process 1 hangs" in ended[0].output
    dumps = {path.name: path.read_text() for path in (tmp_path / "run/hang").iterdir()}
    assert set(dumps) == {f"process-{rank}.{kind}" for rank in (0, 1) for kind in ("json", "stacks")}
    assert "faults/__init__.py" in dumps["process-1.stacks"]
    assert [bool(json.loads(dumps[f"process-{rank}.json"])["entries"]) for rank in (0, 1)] == [True, True]


@pytest.mark.slow
def test_a_process_that_is_stopped_is_named_by_the_others(corpus: Path, tmp_path: Path) -> None:
    """SIGSTOP, a machine that is gone: it cannot speak for itself."""
    fault = Fault("stop", 1, 8, "backward", str(tmp_path / "fired"))
    job = Job(words(tmp_path, corpus, parallel__step_timeout_seconds=5), tmp_path, world_size=2, fault=fault)
    job.wait_until(lambda: job.processes[0].exitcode is not None)
    job.end()
    assert job.processes[0].exitcode == 1
    output = (tmp_path / "output-0.txt").read_text()
    assert "process 1 does not answer: it was killed or is stopped, or its machine" in output
    assert step_of(list_checkpoints(tmp_path / "run")[-1]) == 6


@pytest.mark.slow
def test_torchrun_brings_a_killed_job_back(corpus: Path, straight: Path, tmp_path: Path) -> None:
    """``--max-restarts``: the job comes back by itself and ends as the undisturbed one."""
    fault = Fault("kill", 1, 14, "backward", str(tmp_path / "fired"))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2",
        "-m", "faults", fault.to_json(), *words(tmp_path, corpus),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fired").exists()
    assert "resumed at step 12" in done.stdout
    for rank in range(2):  # the samples of a job below torchrun are not written down
        shutil.copy(straight / f"samples-{rank}.jsonl", tmp_path)
    assert_the_same_run(tmp_path, straight)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("asynchronous", "kills"), [slow(True, 10), nightly(False, 25), nightly(True, 25)])
def test_kills_while_saving_lose_no_checkpoint(corpus: Path, tmp_path: Path, asynchronous: bool, kills: int) -> None:
    """At random moments of writing, committing and removing: what has a checkpoint's name is whole, and none is lost.

    One run that goes on and on, which saves at every step.
    """
    settings = {"parallel__engine": "auto", "train__steps": 100_000, "checkpoint__interval": 1, "eval__interval": 0}
    command = [*words(tmp_path, corpus, **settings), "--checkpoint.async", str(asynchronous).lower()]
    random, newest, moments = Random(int(asynchronous)), 0, []
    for trial in range(kills):
        phase = ("save-data", "save-commit", "retention")[trial % 3]
        delay = random.uniform(0.0005, 0.02)
        fault = Fault("kill", 0, newest + random.randint(3, 6), phase, str(tmp_path / f"fired {trial}"), delay)
        world_size = 2 if trial % 5 == 0 else 1
        ended = launch(command, tmp_path, world_size=world_size, fault=fault)
        assert statuses(ended)[0] == -signal.SIGKILL, ended
        found = [open_checkpoint(each).state.step for each in named_folders(tmp_path / "run")]
        assert 1 <= len(found) <= 3  # retention may have been killed before it removed one
        assert found[-1] >= newest, "a checkpoint that was complete is gone"
        assert found[-1] >= (fault.step or 0) - 2
        newest = found[-1]
        moments.append(sorted(each.name[:8] for each in (tmp_path / "run/checkpoints").glob("tmp-*")))
    kinds = {name for each in moments for name in each}
    assert kinds >= {"tmp-step"}, "no kill came in the midst of a save"


@pytest.mark.slow
def test_the_limit_that_was_exceeded_is_named(corpus: Path, tmp_path: Path) -> None:
    """While data, model or checkpoint are made ready it is another one than during steps."""
    fault = Fault("hang", 0, 40, "evaluation", str(tmp_path / "fired"))
    settings = {"parallel__engine": "local", "parallel__timeout_seconds": 8, "parallel__step_timeout_seconds": 600}
    (ended,) = launch(words(tmp_path, corpus, **settings), tmp_path, world_size=1, fault=fault)
    assert ended.status == 1
    assert "process 0 hangs in the validation after step 40: no progress for " in ended.output
    assert "a longer parallel.timeout_seconds if it was only slow" in ended.output
