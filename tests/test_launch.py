"""The launchers of ``launch/``, as a user calls them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import small_config, tensor_bytes

from inrank_dist.train.checkpoint import list_checkpoints

LAUNCH = Path(__file__).parent.parent / "launch"


def start(script: str, *words: object, **options: Any) -> "subprocess.Popen[str]":
    """A launcher with the environment of the tests, from the checkout."""
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "INRANK_VENV": "/nowhere"}
    command = [str(LAUNCH / script), *(str(word) for word in words)]
    return subprocess.Popen(command, env=environment, text=True, cwd=LAUNCH.parent, **options)


def run(script: str, *words: object) -> "subprocess.CompletedProcess[str]":
    """The same, to its end."""
    job = start(script, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = job.communicate(timeout=110)
    finally:
        job.kill()
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


def wait_until(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "engine"), [("torchrun.sh", "zero2"), ("deepspeed.sh", "zero3")])
def test_trains_and_resumes(corpus: Path, tmp_path: Path, script: str, engine: str) -> None:
    """The second start takes up the run where the first one's checkpoint of step 16 left it."""
    config = small_config(
        corpus, run__dir=tmp_path / "run", parallel__engine=engine, train__micro_batch_size=4, checkpoint__interval=16
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    words = ("-n", 2, "train", "--config", tmp_path / "config.yaml")
    done = run(script, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"on 2 processes (cpu, {engine}" in done.stdout
    assert f"{engine}: deepspeed 0." in done.stdout
    assert "accelerator cpu, backend gloo, optimizer torch AdamW" in done.stdout
    whole = tensor_bytes(tmp_path / "run")
    shutil.rmtree(list_checkpoints(tmp_path / "run")[-1])
    done = run(script, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed at step 16 on 2 processes" in done.stdout
    assert tensor_bytes(tmp_path / "run") == whole


@pytest.mark.slow
@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_a_signal_to_the_launcher_reaches_the_training(corpus: Path, tmp_path: Path, script: str) -> None:
    """The deepspeed launcher would end and leave its processes training; torchrun takes 75 of a process for a
    failure."""
    config = small_config(
        corpus, run__dir=tmp_path / "run", parallel__engine="zero2", train__micro_batch_size=4, train__steps=100_000,
        checkpoint__interval=1000,
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    with (tmp_path / "output").open("w") as output:
        job = start(script, "-n", 2, "train", "--config", tmp_path / "config.yaml", stdout=output, stderr=output)
        try:
            wait_until(lambda: "40/100000" in (tmp_path / "output").read_text().replace(",", ""))
            job.send_signal(signal.SIGTERM)
            status = job.wait(60)
        finally:
            job.kill()
    text = (tmp_path / "output").read_text()
    assert status == (75 if script == "deepspeed.sh" else 1), text
    assert "stopped; the same command goes on from there" in text
    assert len(list_checkpoints(tmp_path / "run")) == 1
    left = [process for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(process.info["cmdline"])]
    wait_until(lambda: not any(process.is_running() for process in left))


@pytest.mark.parametrize(
    ("script", "words", "visible", "says"),
    [
        ("torchrun.sh", "train", None, "--nproc-per-node 4 "),
        ("torchrun.sh", "train", "2,3", "--nproc-per-node 2 "),
        ("torchrun.sh", "train", "", "--nproc-per-node 1 "),
        ("torchrun.sh", "-n 3 train", "", "--nproc-per-node 3 "),
        ("deepspeed.sh", "train", None, "--include localhost:0,1,2,3 --module inrank_dist train"),
        ("deepspeed.sh", "train", "2,3", "--include localhost:2,3 --module inrank_dist train"),
        ("deepspeed.sh", "-n 1 train", "2,3", "--include localhost:2 --module inrank_dist train"),
        ("deepspeed.sh", "-n 3 train", "2,3", "error: -n is 3, but there are 2 GPUs; write at most that"),
        (
            "deepspeed.sh",
            "-n 2 train",
            "",
            "--num_gpus 2 --no_python env CUDA_VISIBLE_DEVICES= python",
        ),
    ],
)
def test_gpus_are_those_that_may_be_used(
    tmp_path: Path, script: str, words: str, visible: str | None, says: str
) -> None:
    """Four GPUs that are not there, and launchers that say how they were called."""
    for name, body in (
        ("nvidia-smi", "for i in 0 1 2 3; do echo GPU $i; done"),
        ("torchrun", "echo torchrun $*"),
        ("deepspeed", "echo deepspeed $*"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    environment |= {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "INRANK_VENV": "/nowhere"}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    command = [str(LAUNCH / script), *words.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert says in done.stdout + done.stderr


@pytest.mark.slow
def test_one_process_needs_no_launcher(corpus: Path, tmp_path: Path) -> None:
    """DeepSpeed itself insists on a launcher's environment. Called again, there is nothing left to do."""
    config = small_config(corpus, run__dir=tmp_path / "run", parallel__engine="zero3", train__micro_batch_size=4)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "inrank_dist", "train", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=LAUNCH.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 1 process (cpu, zero3" in done.stdout
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=LAUNCH.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is complete at step 30" in done.stderr


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ([], 2, "error: no command; write "),
        (["-n", "2"], 2, "error: no command; write "),
        (["-n", "two", "train"], 2, "error: -n is two; write a number of processes of at least 1"),
        (["-n"], 2, "error: -n lacks its value; write -n PROCESSES"),
        (["-q", "train"], 2, "error: -q is no option of "),
        (["--help"], 0, ""),
        (["-h"], 0, ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words(script: str, words: list[str], status: int, says: str) -> None:
    done = run(script, *words)
    assert done.returncode == status
    assert done.stderr.startswith(says)
    assert len(done.stderr.splitlines()) == (1 if status else 0)
    assert ("Usage: launch/" in done.stdout) == (status == 0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_measurement_for_a_gpu_runs_on_cpu_with_small_shapes() -> None:
    small = ["--models", "", "--widths", 64, "--vocab", 320, "--seq", 16, "--batch", 1, "--rounds", 1]
    done = run("bench-gpu.sh", *small)
    assert done.returncode == 0, done.stderr
    for form in ("full rank, compiled", "InRank before the freeze", "InRank after the freeze, compiled", "CoLA"):
        assert form in done.stdout
    assert "bf16; median" in done.stdout
