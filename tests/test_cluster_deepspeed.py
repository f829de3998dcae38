"""The deepspeed launcher with a hostfile: on one host, started by hand on two, and over a real ssh."""

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from cluster_tools import (
    LAUNCH,
    Program,
    free_port,
    job_config,
    launch_environment,
    processes_of,
    require,
    ssh_server,
    wait_until,
)
from runs import tensor_bytes

from inrank_dist.train.checkpoint import list_checkpoints

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

STEPS = 200
"""Enough for a signal at step 10 to arrive before the last one."""

Start = Callable[..., Program]
"""Words of ``launch/deepspeed.sh`` (and ``environment``) -> the running script."""


@contextmanager
def scripts(folder: Path) -> Iterator[Start]:
    programs: list[Program] = []

    def start(*words: Any, environment: dict[str, str] | None = None) -> Program:
        output = folder / f"output-{len(programs)}"
        programs.append(Program([LAUNCH / "deepspeed.sh", *words], output, launch_environment() | (environment or {})))
        return programs[-1]

    try:
        yield start
    finally:
        for program in programs:
            program.end()
        for process in processes_of(folder):  # the launchers have sessions of their own
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with scripts(tmp_path) as start:
        yield start


def train_words(corpus: Path, folder: Path, **changes: Any) -> list[Any]:
    _, file = job_config(
        corpus, folder, parallel__engine="zero2", train__steps=STEPS, checkpoint__interval=STEPS // 2, **changes
    )
    return ["train", "--config", file]


def hostfile(folder: Path, *hosts: str, slots: int) -> Path:
    file = folder / "hosts"
    file.write_text("".join(f"{host} slots={slots}\n" for host in hosts))
    return file


def wait_for_step(program: Program, step: int) -> None:
    def there() -> bool:
        assert program.process.poll() is None, program.text
        return f" {step}/{STEPS}" in program.text

    wait_until(there, 150, lambda: program.text)


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], str]:
    """A run with a hostfile of one host: its folder, the words that started it, what it wrote."""
    folder = tmp_path_factory.mktemp("undisturbed")
    words = ["-f", hostfile(folder, "localhost", slots=2), *train_words(corpus, folder)]
    with scripts(folder) as start:
        job = start(*words)
        assert job.wait(200) == 0, job.text
    return folder, words, job.text


@pytest.fixture(scope="module")
def whole(undisturbed: tuple[Path, list[Any], str]) -> dict[Any, bytes]:
    """Its tensors."""
    return tensor_bytes(undisturbed[0] / "run")


@pytest.mark.nightly
def test_a_hostfile_of_one_host(undisturbed: tuple[Path, list[Any], str], whole: dict[Any, bytes]) -> None:
    """Trains, and takes the run up again where its checkpoint of the middle left it."""
    folder, words, text = undisturbed
    assert "on 2 processes (cpu, zero2" in text
    assert "accelerator cpu, backend gloo" in text
    assert "GLOO_SOCKET_IFNAME" in text
    shutil.rmtree(list_checkpoints(folder / "run")[-1])
    with scripts(folder) as start:
        job = start(*words)
        assert job.wait(200) == 0, job.text
    assert f"resumed at step {STEPS // 2} on 2 processes" in job.text
    assert tensor_bytes(folder / "run") == whole


@pytest.mark.nightly
def test_one_host_without_ssh(corpus: Path, tmp_path: Path, start: Start, whole: dict[Any, bytes]) -> None:
    """Resumes to the same weights, here after its launcher was killed, of which the launcher itself says 0."""
    place = f"127.0.0.1:{free_port()}"
    file = hostfile(tmp_path, "localhost", slots=2)
    words = ["-f", file, "-k", 0, "-m", place, *train_words(corpus, tmp_path)]
    job = start(*words)
    wait_for_step(job, 10)
    (launcher,) = [
        process
        for process in psutil.Process(job.process.pid).children(recursive=True)
        if "deepspeed.launcher.launch" in process.cmdline()
    ]
    launcher.kill()
    assert job.wait(100) == 1, job.text
    assert "the deepspeed launcher was killed; the processes that it left have been stopped" in job.text
    assert not processes_of(tmp_path)
    assert list_checkpoints(tmp_path / "run")  # they were asked to save
    job = start(*words)
    assert job.wait(200) == 0, job.text
    assert "resumed at step " in job.text
    assert tensor_bytes(tmp_path / "run") == whole


@pytest.mark.nightly
def test_two_hosts_without_ssh(corpus: Path, tmp_path: Path, start: Start, whole: dict[Any, bytes]) -> None:
    """Two starts of one process each: a signal to each stops both, and they go on to the weights of the whole run."""
    file, place = hostfile(tmp_path, "127.0.0.1", "127.0.0.2", slots=1), f"127.0.0.1:{free_port()}"
    words = train_words(corpus, tmp_path)

    def both() -> list[Program]:
        return [start("-f", file, "-k", node, "-m", place, *words) for node in (0, 1)]

    jobs = both()
    wait_for_step(jobs[0], 10)
    for job, number in zip(jobs, (signal.SIGTERM, signal.SIGUSR1), strict=True):
        job.process.send_signal(number)
    assert [job.wait(100) for job in jobs] == [75, 75], jobs[0].text + jobs[1].text
    assert "stopped; the same command goes on from there" in jobs[0].text
    assert not processes_of(tmp_path)
    jobs = both()
    assert [job.wait(200) for job in jobs] == [0, 0], jobs[0].text + jobs[1].text
    assert "resumed at step " in jobs[0].text
    for job in jobs:
        assert "GLOO_SOCKET_IFNAME" in job.text
    assert tensor_bytes(tmp_path / "run") == whole


def test_a_signal_before_the_training_is_there(corpus: Path, tmp_path: Path, start: Start) -> None:
    job = start("-f", hostfile(tmp_path, "localhost", slots=2), *train_words(corpus, tmp_path))
    wait_until(lambda: any("--hostfile" in process.cmdline() for process in processes_of(tmp_path)), 60)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(100) == 75, job.text
    assert not processes_of(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An ssh server on two addresses of this machine; the variables with which pdsh finds it."""
    require("pdsh", packages="pdsh")
    folder = tmp_path / "ssh"
    with ssh_server(folder, "127.0.0.1", "127.0.0.2") as port:
        (folder / "client").write_text(
            f"Port {port}\nIdentityFile {folder}/user\nUserKnownHostsFile {folder}/known\nStrictHostKeyChecking no\n"
            "LogLevel ERROR\n"
        )
        yield {"PDSH_SSH_ARGS_APPEND": f"-F {folder}/client"}


def test_over_ssh(corpus: Path, tmp_path: Path, start: Start, whole: dict[Any, bytes], ssh: dict[str, str]) -> None:
    """One start for both hosts; words arrive as they were, the signal as well, and so does the exit status."""
    name = "it's 100 %n; $HOME ~ *"
    file, place = hostfile(tmp_path, "127.0.0.1", "127.0.0.2", slots=1), f"127.0.0.1:{free_port()}"
    words = ["-f", file, "-m", place, *train_words(corpus, tmp_path), "--run.name", name]
    job = start(*words, environment=ssh)
    wait_for_step(job, 10)
    job.process.send_signal(signal.SIGINT)
    assert job.wait(100) == 75, job.text
    assert "stopped; the same command goes on from there" in job.text
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["run"]["name"] == name
    assert not [process for process in processes_of(tmp_path) if "sshd" not in process.name()]
    job = start(*words, environment=ssh)
    assert job.wait(200) == 0, job.text
    assert "resumed at step " in job.text
    assert tensor_bytes(tmp_path / "run") == whole

    job = start("-f", hostfile(tmp_path, "127.0.0.1", "127.0.0.3", slots=1), "-m", place, "train", environment=ssh)
    assert job.wait(60) == 2
    assert job.text.startswith("error: ssh does not reach every host (127.0.0.3: ssh: connect to host 127.0.0.3"), (
        job.text
    )
    assert len(job.text.splitlines()) == 1
