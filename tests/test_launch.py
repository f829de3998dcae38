"""The launchers of ``launch/``, as a user calls them."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cluster_tools import (
    LAUNCH,
    free_port,
    launch_environment,
    listens_beyond_loopback,
    processes_of,
    sockets_of,
    wait_until,
)
from runs import small_config, tensor_bytes, the_error
from sharing import nightly, slow

from inrank_dist.launcher import deepspeed
from inrank_dist.launcher.agent import agent_class
from inrank_dist.launcher.common import Outcome
from inrank_dist.launcher.network import reachable
from inrank_dist.launcher.torchrun_job import read_job
from inrank_dist.runtime.signals import STOP_SIGNALS
from inrank_dist.train.checkpoint import list_checkpoints


def start(script: str, *words: object, **options: Any) -> "subprocess.Popen[str]":
    """A launcher with the environment of the tests, from the checkout."""
    command = [str(LAUNCH / script), *(str(word) for word in words)]
    return subprocess.Popen(command, env=launch_environment(), text=True, **({"cwd": LAUNCH.parent} | options))


def run(script: str, *words: object) -> "subprocess.CompletedProcess[str]":
    """The same, to its end."""
    job = start(script, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = job.communicate(timeout=110)
    finally:
        job.kill()
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Gives back the signals that a launcher in this process takes."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("script", "engine"), [nightly("torchrun.sh", "zero2"), nightly("deepspeed.sh", "zero3")])
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
@pytest.mark.parametrize("numbered", [(), ("-k", 0)])
def test_a_port_that_another_program_has(numbered: tuple[Any, ...]) -> None:
    """It takes connections and says nothing, for which torch waits without a limit."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        done = run("torchrun.sh", "-n", 1, "-N", 2, *numbered, "-m", f"127.0.0.1:{port}", "-w", 5, "train")
    said = f"port {port} of 127.0.0.1 is taken by another program; write another port with -m, on every node"
    assert the_error(done.returncode, done.stderr) == said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "options"),
    [(signal.SIGTERM, ("-N", "1:2")), (signal.SIGINT, ("-N", 2)), (signal.SIGUSR1, ("-N", 2, "-k", 0))],
)
def test_nodes_of_two_jobs_do_not_meet(tmp_path: Path, number: signal.Signals, options: tuple[Any, ...]) -> None:
    """One job waits for its second node; another one that was given the same port is refused. A signal ends the
    waiting."""
    meet = ("-n", 1, "-m", f"localhost:{free_port()}", "-w", 60)
    output = tmp_path / "output"
    with output.open("w") as file:
        waiting = start("torchrun.sh", *options, *meet, "bench", "nodes", stdout=file, stderr=file)
    try:
        wait_until(lambda: reachable("127.0.0.1", int(meet[3].partition(":")[2]), 1))
        other = [word for word in options if word not in ("-k", 0)]
        done = run("torchrun.sh", *other, *meet, "bench", "nodes", "--repeats", 3)
        assert " is taken by another job; write another port with -m on every node" in the_error(2, done.stderr)
        assert done.returncode == 2
        waiting.send_signal(number)
        assert waiting.wait(10) == 75
        assert "stopped while no training was running" in output.read_text()
    finally:
        waiting.kill()


@pytest.mark.parametrize("wrong", [slow(0), nightly(1)])
def test_a_mistake_on_one_node_ends_the_others(corpus: Path, tmp_path: Path, wrong: int) -> None:
    """Their processes would wait for those that are gone. Node 0 keeps the store by which they hear of it."""
    config = small_config(corpus, run__dir=tmp_path / "run", train__micro_batch_size=4).to_yaml()
    port, jobs = free_port(), []
    for node in (0, 1):
        folder = tmp_path / str(node)
        folder.mkdir()
        (folder / "config.yaml").write_text(f"{config}\nbogus: 1\n" if node == wrong else config)
        words = ("-n", 1, "-N", 2, "-k", node, "-m", f"localhost:{port}", "train", "--config", "config.yaml")
        jobs.append(start("torchrun.sh", *words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    try:
        told = [job.communicate(timeout=90)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert "unknown section bogus" in the_error(jobs[wrong].returncode, told[wrong])
    assert "exited with a user error; see its output there" in the_error(jobs[1 - wrong].returncode, told[1 - wrong])


@pytest.mark.slow
def test_a_killed_launcher_leaves_nobody(corpus: Path, tmp_path: Path) -> None:
    """torch's agent cannot end its processes then; they save and end by themselves."""
    config = small_config(corpus, run__dir=tmp_path / "run", train__micro_batch_size=4, train__steps=100_000)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    output = tmp_path / "output"
    with output.open("w") as file:
        job = start("torchrun.sh", "-n", 2, "train", "--config", tmp_path / "config.yaml", stdout=file, stderr=file)
    wait_until(lambda: "40/100000" in output.read_text().replace(",", ""))
    job.kill()
    job.wait()
    wait_until(lambda: not processes_of(tmp_path))
    assert "stopped; the same command goes on from there" in output.read_text()
    assert len(list_checkpoints(tmp_path / "run")) == 1


def test_processes_have_time_to_save_with_every_release_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents of releases before 2.13 pass no timeout and wait for 30 s."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "180")
    job = read_job(["train", "--config", "config.yaml"])
    agent_type = agent_class(job, None, "", lambda statuses: 0, Outcome())
    agent = agent_type.__new__(agent_type)
    closed: list[tuple[object, ...]] = []
    context = SimpleNamespace(close=lambda *arguments: closed.append(arguments))
    vars(agent).update(_pcontext=context, _worker_watchdog=None, _health_check_server=None)
    agent._shutdown(signal.SIGTERM)
    assert closed[0] == (signal.SIGTERM, 180)


@pytest.mark.slow
def test_deepspeed_on_cpus_does_without_a_compiler(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an image without one; what an earlier run has built is out of sight."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    config = small_config(
        corpus, run__dir=tmp_path / "run", parallel__engine="zero2", train__micro_batch_size=4, lowrank__warmup_steps=9,
        lowrank__interval=4, train__steps=10,
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    done = run("torchrun.sh", "-n", 2, "train", "--config", tmp_path / "config.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 processes (cpu, zero2" in done.stdout


@pytest.mark.timeout(400)
@pytest.mark.parametrize("script", [slow("torchrun.sh"), nightly("deepspeed.sh")])
def test_a_signal_to_the_launcher_reaches_the_training(corpus: Path, tmp_path: Path, script: str) -> None:
    """The deepspeed launcher itself would end and leave its processes training, and torchrun end with 1."""
    config = small_config(
        corpus, run__dir=tmp_path / "run", parallel__engine="zero2", train__micro_batch_size=4, train__steps=100_000,
        checkpoint__interval=1000,
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    with (tmp_path / "output").open("w") as output:
        job = start(script, "-n", 2, "train", "--config", tmp_path / "config.yaml", stdout=output, stderr=output)
        try:
            wait_until(lambda: "40/100000" in (tmp_path / "output").read_text().replace(",", ""))
            # What listens takes connections from whoever reaches it: torch's store has no authentication.
            started = processes_of(tmp_path)
            assert sum(bool(sockets_of(process.pid, "0A")) for process in started) >= 2
            assert not [address for process in started for address in listens_beyond_loopback(process.pid)]
            job.send_signal(signal.SIGTERM)
            status = job.wait(120)
        finally:
            job.kill()
    text = (tmp_path / "output").read_text()
    assert status == 75, text
    assert "stopped; the same command goes on from there" in text
    assert len(list_checkpoints(tmp_path / "run")) == 1
    wait_until(lambda: not processes_of(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "visible", "says"),
    [
        ("train", None, "--num_gpus 4 .* CUDA_VISIBLE_DEVICES=0,1,2,3 -- train$"),
        ("train", "2,3", "--num_gpus 2 .* CUDA_VISIBLE_DEVICES=2,3 -- train$"),
        ("train", "GPU-5a,GPU-7b,-1", "--num_gpus 2 .* CUDA_VISIBLE_DEVICES=GPU-5a,GPU-7b -- train$"),
        ("-n 1 train", "2,3", "--num_gpus 1 .* CUDA_VISIBLE_DEVICES=2 -- train$"),
        ("-n 3 train", "2,3", "^error: -n is 3, but there are 2 GPUs; write at most that$"),
        ("-n 2 train", "", "--num_gpus 2 .* CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu -- train$"),
        ("-f hosts -k 1 -m localhost train", "2,3", "--node_rank 1 .* CUDA_VISIBLE_DEVICES=2,3 -- train$"),
        ("-f hosts -k 0 -m localhost train", "2,3", "^error: first has slots=3, but there are 2 GPUs; write at most"),
        ("-f hosts -n 2 -k 0 -m localhost train", "2,3", "--num_gpus 2 .* CUDA_VISIBLE_DEVICES=2,3 -- train$"),
        ("-f hosts -m localhost train", "0,1", "^error: CUDA_VISIBLE_DEVICES is 0,1, but first will use 0,1,2; unset"),
        ("-f hosts -m localhost train", None, "--force_multi .* INRANK_LAUNCH=[0-9a-f]* -- train$"),
        ("-f hosts -m localhost train", "", "--force_multi .* CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu -- train$"),
    ],
)
def test_deepspeed_is_given_the_gpus_that_may_be_used(
    tmp_path: Path, words: str, visible: str | None, says: str
) -> None:
    """Four GPUs that are not there, two hosts as well, and a launcher that says how it was called."""
    for name, body in (
        ("nvidia-smi", "for i in 0 1 2 3; do echo GPU $i; done"),
        ("deepspeed", "echo deepspeed $*"),
        ("pdsh", "exit 0"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("first slots=3\nsecond slots=2\n")
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(LAUNCH.parent)}
    environment.pop("OMP_NUM_THREADS", None)
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    command = [sys.executable, "-m", "inrank_dist.launcher.deepspeed", *words.split()]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert re.search(says, done.stdout + done.stderr, re.MULTILINE), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "hosts", "says"),
    [
        ("-m node1", None, "-m is node1 but there is no hostfile; write -f FILE, or leave -m out"),
        ("-k 0", None, "-k is 0 but there is no hostfile; write -f FILE, or leave -k out"),
        ("-f hosts", None, "-f is hosts, which cannot be read (No such file or directory); write a file of lines HOST"),
        ("-f hosts", "", "hosts names no host; write a line HOST slots=N for each"),
        ("-f hosts", "# a\n\na slots=2\nb 2\n", "line 4 of hosts is 'b 2'; write HOST slots=N, such as node1 slots=4"),
        ("-f hosts", "a[1-4] slots=2", "line 1 of hosts is 'a[1-4] slots=2'; write HOST slots=N"),
        ("-f hosts", "a slots=two", "line 1 of hosts is 'a slots=two'; write HOST slots=N"),
        ("-f hosts", "a slots=0", "a has slots=0 in hosts; write a number of at least 1, or leave the line out"),
        (
            "-f hosts",
            "a slots=1\nb slots=1\na slots=1",
            "a appears twice in hosts; write one line for it, with all its slots",
        ),
        ("-f hosts -n 3", "a slots=4\nb slots=2", "-n is 3, but b has slots=2 in hosts; write at most that"),
        (
            "-f hosts -k 2 -m localhost",
            "a slots=1\nb slots=1",
            "-k is 2, but hosts has 2 host(s); write a number from 0",
        ),
        ("-f hosts -k -1 -m localhost", "a slots=1", "-k is -1, but hosts has 1 host(s); write a number from 0 to 0"),
        ("-f hosts -k x", "a slots=1", "argument -k: invalid int value: 'x'"),
        ("-f hosts -k 1", "a slots=1\nb slots=1", "-k is 1 but -m is missing; write -m a, the same on every host"),
        ("-f hosts -k 0 -m a:b", "a slots=1", "'a:b' is not a rendezvous endpoint; write HOST or HOST:PORT"),
        ("-f hosts -k 0 -m no.such.invalid", "a slots=1", " cannot resolve the host name no.such.invalid ("),
        ("-f hosts", "no.such.invalid slots=1", " cannot resolve the host name no.such.invalid ("),
        (
            "-f hosts",
            "a slots=1\nb slots=1",
            "pdsh, with which DeepSpeed starts the hosts of hosts, is not installed; ",
        ),
        (
            "-f hosts -m localhost",
            "a slots=1\nb slots=1",
            "is not installed; install it (Debian: apt-get install pdsh)",
        ),
        (
            "-f hosts",
            "localhost slots=1",
            "deepspeed is not installed; write pip install -e '.[deepspeed]' in the checkout",
        ),
    ],
)
@pytest.mark.usefixtures("handlers")
def test_mistakes_of_a_deepspeed_job(
    tmp_path: Path,
    words: str,
    hosts: str | None,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    if hosts is not None:
        Path("hosts").write_text(hosts)
    status = deepspeed.main([*words.split(), "train"])
    assert says in the_error(status, capsys.readouterr().err)


@pytest.mark.usefixtures("handlers")
def test_deepspeed_hosts_that_take_the_first_for_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pdsh").write_text("")
    (tmp_path / "pdsh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "hosts").write_text("localhost slots=1\nb slots=1\n")
    status = deepspeed.main(["-f", str(tmp_path / "hosts"), "train"])
    assert "is a loopback address here" in the_error(status, capsys.readouterr().err)


@pytest.mark.parametrize("word", ["", "%", "~", "a b", "it's", '"$HOME"', "[20,21]", "a|b;c&d", "50%n", "--é=\n\t*"])
def test_words_pass_a_remote_shell(word: str) -> None:
    """As deepspeed and pdsh hand them on: joined by blanks, and read by a shell."""
    wrapped = deepspeed.encode_argument(word)
    assert "%n" not in wrapped
    done = subprocess.run(["sh", "-c", f"printf %s {wrapped}"], capture_output=True, text=True, check=True)
    assert done.stdout == wrapped
    assert deepspeed.decode_argument(wrapped) == word


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
        (["-n", "0", "train"], 2, "error: -n is 0; write a number of processes of at least 1"),
        (["-n", "two", "train"], 2, "error: argument -n: invalid int value: 'two'; see launch/"),
        (["-n"], 2, "error: argument -n: expected one argument; see launch/"),
        (["-q", "train"], 2, "error: unrecognized arguments: -q; see launch/"),
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
    assert ("usage: launch/" in done.stdout) == (status == 0)


def test_what_slurm_would_be_given_where_it_does_not_answer(tmp_path: Path) -> None:
    """What only a cluster knows must then be written."""
    for name in ("sbatch", "sinfo"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'sinfo: fatal: no controller' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    environment = launch_environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = [LAUNCH / "slurm.sh", "--config", LAUNCH.parent / "configs/quickstart.yaml", "--run", tmp_path / "my"]

    def dry_run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*words, "--dry-run", *more], env=environment, capture_output=True, text=True, timeout=60)

    assert (
        "--nodes 16 --signal B:USR1@180 --gpus-per-node 8 --exclusive" in dry_run("--nodes", "16", "--gpus", "8").stdout
    )
    done = dry_run("--nodes", "16")
    assert done.returncode == 2 and not done.stdout
    advice = "write --gpus N as well, and --dry-run needs no Slurm"
    assert done.stderr == f"error: Slurm does not answer: sinfo: fatal: no controller; {advice}\n"


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh", "bench-gpu.sh", "gpu.sh"])
def test_help_starts_nothing(script: str, tmp_path: Path) -> None:
    command = [LAUNCH / script, "--help"]
    environment = launch_environment() | {"INRANK_VENV": str(tmp_path / "venv")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f"Usage: launch/{script}" in done.stdout and not done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_the_measurement_for_a_gpu_runs_on_cpu_with_small_shapes() -> None:
    small = ["--models", "", "--widths", 64, "--vocab", 320, "--seq", 16, "--batch", 1, "--rounds", 1]
    done = run("bench-gpu.sh", *small)
    assert done.returncode == 0, done.stderr
    for form in ("full rank, compiled", "InRank before the freeze", "InRank after the freeze, compiled", "CoLA"):
        assert form in done.stdout
    assert "bf16; median" in done.stdout
