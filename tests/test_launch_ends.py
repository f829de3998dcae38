"""How a training ends, or does not, when its terminal or its launcher goes, or a signal comes early."""

import os
import pty
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster_tools import LAUNCH, ROOT, job_config, launch_environment, nothing_left, processes_of, sockets_of
from cluster_tools import wait_until as wait_at_most
from sharing import nightly, slow

from inrank_dist.train.checkpoint import list_checkpoints, step_of

wait_until = partial(wait_at_most, timeout=150)  # on a machine with other work as well

TRAIN = [sys.executable, "-m", "inrank_dist", "train"]
STARTS: dict[str, list[Any]] = {
    "train": TRAIN,
    "torchrun.sh": [LAUNCH / "torchrun.sh", "-n", 2, "train"],
    "deepspeed.sh": [LAUNCH / "deepspeed.sh", "-n", 2, "train"],
}


def config_of(corpus: Path, folder: Path, **changes: Any) -> Path:
    """Of a run that does not end by itself, and writes no checkpoint by itself."""
    settings: dict[str, Any] = {"train__steps": 1_000_000, "parallel__engine": "auto"}
    return job_config(corpus, folder, **settings | changes)[1]


def step_reached(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b'"kind": "step"') if metrics.exists() else 0


class OnTerminal:
    """A program in a session of its own with a terminal, which ``close`` takes away, as a closed window does."""

    def __init__(self, words: list[Any], folder: Path) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe(str(words[0]), [str(word) for word in words], launch_environment() | {"PYTHONPATH": str(ROOT)})
        self.status: int | None = None

    def close(self) -> None:
        os.close(self.descriptor)

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None


@pytest.mark.timeout(400)
@pytest.mark.parametrize("start", [nightly("train"), slow("torchrun.sh"), nightly("deepspeed.sh")])
def test_a_closed_terminal_saves_and_stops_unless_hangups_are_ignored(corpus: Path, tmp_path: Path, start: str) -> None:
    """First as below ``nohup``, but that it stays with its dead terminal: it goes on, a signal stops it. Then plain."""
    words = [*STARTS[start], "--config", config_of(corpus, tmp_path)]
    with nothing_left(tmp_path):
        job = OnTerminal(["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *words], tmp_path)
        wait_until(lambda: step_reached(tmp_path / "run") > 3)
        job.close()
        closed_at = step_reached(tmp_path / "run")
        wait_until(lambda: step_reached(tmp_path / "run") > closed_at + 10)
        os.kill(job.pid, signal.SIGHUP)
        hung_up_at = step_reached(tmp_path / "run")
        wait_until(lambda: step_reached(tmp_path / "run") > hung_up_at + 10)
        os.kill(job.pid, signal.SIGTERM)
        wait_until(job.ended)
        (saved,) = map(step_of, list_checkpoints(tmp_path / "run"))
        assert (job.status, saved > hung_up_at) == (75, True)

        job = OnTerminal(words, tmp_path)
        wait_until(lambda: step_reached(tmp_path / "run") > saved + 3)
        job.close()
        wait_until(job.ended)
        assert job.status == 75
        assert step_of(list_checkpoints(tmp_path / "run")[-1]) > saved
        wait_until(lambda: not processes_of(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_a_process_that_is_only_starting(corpus: Path, tmp_path: Path, number: signal.Signals) -> None:
    """While it imports its libraries nothing can be lost yet."""
    process = subprocess.Popen(
        [*TRAIN, "--config", config_of(corpus, tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: number in caught_by(process.pid))
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, said
    assert said == "stopped before the training began; nothing is lost, the same command starts it\n"
    assert not (tmp_path / "run").exists()


def caught_by(pid: int) -> set[int]:
    """The signals that a process handles."""
    (mask,) = [line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigCgt" in line]
    return {number for number in range(1, 65) if int(mask, 16) >> (number - 1) & 1}


LATE = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
(folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
while os.environ["RANK"] == "1" and not (folder / "go").exists():
    time.sleep(0.05)
from inrank_dist.commands.main import main
sys.exit(main(["train", "--config", str(folder / "config.yaml")]))
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_launcher_that_is_killed_before_the_processes_have_met(corpus: Path, tmp_path: Path) -> None:
    """Process 0 waits for process 1, which is late, when torchrun gets SIGKILL: it leaves. Process 1, when it comes at
    last, finds nobody and leaves as well. Neither waits for ``parallel.timeout_seconds``."""
    config_of(corpus, tmp_path, parallel__timeout_seconds=1200)
    (tmp_path / "late.py").write_text(LATE)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "late.py", tmp_path]
    with nothing_left(tmp_path), (tmp_path / "output").open("w") as output:
        launcher = subprocess.Popen(
            [sys.executable, *map(str, words)],
            stdout=output,
            stderr=output,
            env=launch_environment() | {"PYTHONPATH": str(ROOT)},
        )
        wait_until(lambda: all((tmp_path / f"pid-{rank}").exists() for rank in (0, 1)))
        waiting, late = (psutil.Process(int((tmp_path / f"pid-{rank}").read_text())) for rank in (0, 1))
        wait_until(lambda: sockets_of(waiting.pid, "01"))  # to the store: it looks for the other one
        launcher.kill()
        launcher.wait()
        wait_until(lambda: not waiting.is_running())
        assert late.is_running()
        (tmp_path / "go").touch()
        wait_until(lambda: not late.is_running())
    said = (tmp_path / "output").read_text()
    assert "process 1 of 2 did not find the others" in said


ASKING = """
import runpy, sys, threading
import torch.distributed as dist

store = dist.HashStore()
store.set("news", "none")

def ask():
    while True:
        store.check(["news"])

for _ in range(2):
    threading.Thread(target=ask, daemon=True).start()
runpy.run_module("inrank_dist.launcher.torchrun", run_name="__main__")
"""


def test_a_thread_that_asks_the_store_does_not_abort_the_launcher() -> None:
    """Python ends such a thread, while it is taken down, in a way that torch's C++ answers with ``std::terminate``: two
    nodes had measured themselves well, and the job started again as one of them ended with status 134."""
    done = subprocess.run(
        [sys.executable, "-c", ASKING, "-n", "two", "train"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: argument -n")
    assert len(done.stderr.splitlines()) == 1
