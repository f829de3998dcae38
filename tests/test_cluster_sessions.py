"""A training as the first process of a container, and in an ssh session that drops."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from cluster_tools import (
    LAUNCH,
    ROOT,
    job_config,
    launch_environment,
    nothing_left,
    processes_of,
    require_privilege,
    ssh_server,
)
from cluster_tools import wait_until as wait_at_most

from inrank_dist.train.checkpoint import list_checkpoints

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

wait_until = partial(wait_at_most, timeout=150)


def endless(corpus: Path, folder: Path) -> Path:
    """The config of a run that does not end by itself."""
    return job_config(corpus, folder, train__steps=1_000_000, parallel__engine="auto")[1]


def steps_of(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b'"kind": "step"') if metrics.exists() else 0


@pytest.mark.parametrize("launcher", [False, True])
def test_the_first_process_of_a_container(corpus: Path, tmp_path: Path, launcher: bool) -> None:
    """The kernel keeps from it every signal that it does not handle: a closed console, ``docker stop``."""
    require_privilege("unshare", "--pid", "--fork", "true", what="process namespaces")
    train = [LAUNCH / "torchrun.sh", "-n", 2] if launcher else [sys.executable, "-m", "inrank_dist"]
    words = ["unshare", "--pid", "--fork", "--mount-proc", *train, "train", "--config", endless(corpus, tmp_path)]
    with nothing_left(tmp_path):
        outside = subprocess.Popen(
            [str(word) for word in words], stdout=subprocess.PIPE, env=launch_environment(), cwd=ROOT
        )
        assert outside.stdout is not None
        outside.stdout.readline()
        outside.stdout.close()
        wait_until(lambda: steps_of(tmp_path / "run") > 10)
        (first,) = psutil.Process(outside.pid).children()
        first.send_signal(signal.SIGTERM)
        assert outside.wait(100) == 75
    assert len(list_checkpoints(tmp_path / "run")) == 1


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[list[str]]:
    """The words of an ssh to this machine."""
    folder = tmp_path / "ssh"
    with ssh_server(folder, "127.0.0.1") as port:
        options = [f"UserKnownHostsFile={folder}/known", "StrictHostKeyChecking=no", "LogLevel=ERROR"]
        given = [word for option in options for word in ("-o", option)]
        yield ["ssh", "-p", str(port), "-i", f"{folder}/user", *given, "127.0.0.1"]


@pytest.mark.parametrize("terminal", [True, False])
def test_an_ssh_session_that_drops(corpus: Path, tmp_path: Path, ssh: list[str], terminal: bool) -> None:
    """With a terminal the training saves and stops; without one nobody tells it, and it goes on without its console."""
    run, command = tmp_path / "run", f"{sys.executable} -m inrank_dist train --config {endless(corpus, tmp_path)}"
    session = [ssh[0], *(["-tt"] if terminal else []), *ssh[1:], f"cd {ROOT} && OMP_NUM_THREADS=1 exec {command}"]
    with nothing_left(tmp_path):
        client = subprocess.Popen(session, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        wait_until(lambda: steps_of(run) > 5)
        client.kill()
        client.wait()
        dropped_at = steps_of(run)
        if terminal:
            wait_until(lambda: not [each for each in processes_of(tmp_path) if "inrank_dist" in each.cmdline()])
            assert len(list_checkpoints(run)) == 1
        else:
            wait_until(lambda: steps_of(run) > dropped_at + 50)
