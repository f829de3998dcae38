"""Jobs under a real Slurm of two nodes: whatever stops them on the way, they end by themselves, and the same."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_tools import LAUNCH, ROOT, job_config, wait_until
from runs import tensor_bytes, the_error
from slurm_rig import Slurm

from inrank_dist.train.checkpoint import list_checkpoints

# A group of its own beside the other clusters: it needs no network but loopback, and waits a lot.
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200), pytest.mark.xdist_group("slurm")]

STEPS = 200
TRAINING = "-m inrank_dist train"


class Job:
    """A run of ``STEPS`` steps with a checkpoint every 50; ``facts`` are Slurm's when it was last waited for."""

    def __init__(self, slurm: Slurm, corpus: Path, folder: Path) -> None:
        changes = {"train__steps": STEPS, "checkpoint__interval": 50, "log__interval": 20}
        self.slurm, self.run = slurm, folder / "run"
        self.file = job_config(corpus, folder, **changes)[1]
        self.id = ""
        self.facts: dict[str, str] = {}

    def submit(self, *words: object, before: tuple[str, ...] = ()) -> None:
        """With ``launch/slurm.sh``; ``before`` stands before it."""
        done = self.slurm.run(*before, LAUNCH / "slurm.sh", "--config", self.file, "--run", self.run, *words)
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.split()[1].rstrip(":")

    def log(self, node: str = "") -> str:
        """What the job said and its nodes; or one of the nodes."""
        name = f"{self.id}-node{node}-*.log" if node else f"{self.id}*.log"
        return "".join(file.read_text() for file in sorted((self.run / "logs").glob(name)))

    def wait(self, *states: str, task: str = "", timeout: float = 150) -> None:
        self.facts = self.slurm.wait_for(self.id + task, timeout, self.log, *states)

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: re.search(rf"^ *{step}/{STEPS} ", self.log("0"), re.M), 120, self.log)

    def ends_like(self, undisturbed: "Job") -> None:
        self.wait()
        assert self.facts["JobState"] == "COMPLETED", self.log()
        assert tensor_bytes(self.run) == tensor_bytes(undisturbed.run)
        assert "done; the run is in" in self.log()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    slurm = Slurm(tmp_path_factory.mktemp("slurm") / "rig")
    yield slurm
    slurm.close()


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two nodes, one process each, and nothing happens to it."""
    job = Job(slurm, corpus, tmp_path_factory.mktemp("undisturbed"))
    job.submit("--nodes", 2, "--gpus", 0)
    job.wait()
    return job


@pytest.fixture
def job(slurm: Slurm, corpus: Path, tmp_path: Path) -> Iterator[Job]:
    job = Job(slurm, corpus, tmp_path)
    yield job
    if job.id:
        slurm.run("scancel", job.id)


def test_two_nodes_train_to_the_end(undisturbed: Job) -> None:
    """Slurm's names of the nodes are unknown to the resolver here, so the job takes their address from Slurm."""
    said = undisturbed.log()
    assert (undisturbed.facts["JobState"], undisturbed.facts["Restarts"]) == ("COMPLETED", "0"), said
    assert "2 nodes (n[1-2]) of partition cpu" in said
    assert "on 2 processes (cpu, fsdp" in undisturbed.log("0")
    assert f"{STEPS}/{STEPS} " in undisturbed.log("0")
    for node in "01":
        assert "GLOO_SOCKET_IFNAME lo, OMP_NUM_THREADS 1" in undisturbed.log(node)
    measured = said.split("measuring the nodes")[1].split("training; each node's log")[0]
    assert "all-reduce of 1 MiB over 2 processes" in measured
    assert all(re.search(rf"^n{node} +1 +[\d.]+ ", measured, re.M) for node in (1, 2))


def test_the_time_limit(job: Job, undisturbed: Job) -> None:
    """Asked before the limit it saves, is requeued and resumes. The limit is set when the training is under way, and
    its processes are held until Slurm's signal comes, so that neither a slow nor a fast machine misses it."""
    job.submit("--nodes", 2, "--gpus", 0, "--time", 30, "--signal", 15, "--no-check")
    job.wait_for_step(40)
    held = [process for node in ("n1", "n2") for process in job.slurm.processes(node, TRAINING)]
    for process in held:
        process.suspend()
    try:
        job.wait("RUNNING")
        minutes, seconds = map(int, job.facts["RunTime"].split(":")[1:])
        job.slurm.run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes + 1 + (seconds > 30)}")
        wait_until(lambda: "received SIGUSR1; the training is asked to save and stop" in job.log(), 120, job.log)
    finally:
        for process in held:
            process.resume()
    job.wait("PENDING")
    job.slurm.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=30")
    saved = list_checkpoints(job.run)[-1].name
    assert 40 <= int(saved.removeprefix("step-")) < STEPS
    assert f"requeued; newest checkpoint: {saved}" in job.log()
    job.ends_like(undisturbed)
    assert int(job.facts["Restarts"]) >= 1
    assert "resumed at step" in job.log("0")


def test_two_nodes_are_lost(job: Job, undisturbed: Job) -> None:
    """One after the other. The last one, n1, runs the job's own script: then it is Slurm alone that brings it back."""
    job.submit("--nodes", 2, "--gpus", 0, "--no-check")
    for lost, step in (("n2", 60), ("n1", 120)):
        job.wait("RUNNING")
        job.wait_for_step(step)
        assert job.slurm.processes(lost, TRAINING)
        job.slurm.kill_node(lost)
        try:
            job.wait("PENDING")
        finally:
            job.slurm.start_node(lost)
    job.ends_like(undisturbed)
    assert job.facts["Restarts"] == "2"
    for step in (50, 100):
        assert f"newest checkpoint: step-{step:08d}" in job.log()
        assert f"resumed at step {step} on 2 processes" in job.log("0")


def test_what_somebody_stops_is_not_requeued(job: Job, undisturbed: Job) -> None:
    """Submitted again it goes on; the last time by sbatch itself, for a core of each node."""
    for words, step, state in ((("--batch", "--signal", "TERM"), 20, "FAILED"), ((), 100, "CANCELLED")):
        job.submit("--nodes", 2, "--gpus", 0, "--no-check")
        job.wait_for_step(step)
        assert job.slurm.run("scancel", *words, job.id).returncode == 0
        job.wait()
        assert (job.facts["JobState"], job.facts["Restarts"]) == (state, "0"), job.log()
        saved = list_checkpoints(job.run)[-1].name
        assert re.search(rf"ended on request \(status 75\), not requeued; .* {saved}$", job.log(), re.M), job.log()
        assert int(saved.removeprefix("step-")) >= step
    options = ("--parsable", "--nodes", 2, "--cpus-per-task", 1, "--output", job.run / "logs" / "%j.log")
    words = ("--config", job.file, "--run", job.run, "--gpus", 0, "--no-check")
    done = job.slurm.run("sbatch", *options, LAUNCH / "slurm.sbatch", *words)
    assert done.returncode == 0, done.stderr
    job.id = done.stdout.strip()
    job.ends_like(undisturbed)
    assert f"resumed at step {int(saved.removeprefix('step-'))} " in job.log("0")


def test_seeds_in_containers(job: Job, tmp_path: Path) -> None:
    """An array of two seeds, each on a node of its own with a process for each of its two GPUs (which are none: empty
    files that Slurm counts). apptainer is not there; what stands in for it shows how it is called."""
    calls, image = tmp_path / "calls", tmp_path / "image.sif"
    image.touch()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "apptainer"
    to_the_image = f'while [ "$1" != {image} ]; do shift; done; shift'
    program.write_text(f'#!/bin/sh\necho "$1 $2 $3 $4" >>{calls}\n{to_the_image}\nexec "$@"\n')
    program.chmod(0o755)
    path = f"PATH={program.parent}:{job.slurm.environment['PATH']}"
    words = ("--seeds", "0-1", "--image", image, "--mounts", "/usr/share", "--", "--train.steps", 30)
    job.submit(*words, before=("env", path, "CUDA_VISIBLE_DEVICES="))
    for seed in "01":
        job.wait(task=f"_{seed}")
        assert job.facts["JobState"] == "COMPLETED", job.log()
        assert f"gpt2, efficient, seed {seed}, on 2 processes" in job.log()
        assert [checkpoint.name for checkpoint in list_checkpoints(job.run / f"seed-{seed}")] == ["step-00000030"]
    (call, _) = calls.read_text().splitlines()
    assert call.startswith("exec --nv --bind /")
    assert {str(folder) for folder in (ROOT, job.run, tmp_path, "/usr/share")} == set(call.split()[3].split(","))


def test_a_mistake_and_a_crash(job: Job) -> None:
    """The one is not requeued; the other is, but not for ever: here each start fails for want of memory."""
    job.submit("--gpus", 0, "--", "--train.step", 5)
    job.wait()
    assert (job.facts["ExitCode"], job.facts["Restarts"]) == ("2:0", "0"), job.log()
    assert re.search(r"^error: .*train\.step\b", job.log(), re.M)
    assert "an error in the arguments or settings; not requeued" in job.log()

    job.submit("--gpus", 0, before=("bash", "-c", 'ulimit -v 400000; exec "$@"', "bash"))
    job.wait()
    assert (job.facts["JobState"], job.facts["Restarts"]) == ("FAILED", "2"), job.log()
    assert job.log().count("a process or a node failed (status") == 2
    assert "error: 3 starts in a row without a new checkpoint" in job.log()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--partition big", "there is no partition big; write --partition with one of: cpu gpu"),
        ("--nodes 3", "--nodes is 3, but partition cpu has 2; write at most that"),
        ("--nodes two", "--nodes is two; write a whole number of at least 1"),
        ("--gpus 9", "sbatch refused: Batch job submission failed: Requested node configuration is not available"),
        ("--time soon", "--time is soon; write minutes, H:MM:SS or D-H, such as 90, 1:30:00 or 2-0"),
        ("--seeds a", "--seeds is a; write a list such as 0-4, 1,3 or 0-9%2"),
        ("--image ./none.sif", "--image is ./none.sif, which does not exist"),
        ("--config none.yaml", "--config is none.yaml, which is not a file"),
        ("--run /dev/null/run", "--run is /dev/null/run, which cannot be created"),
        ("--run", "--run lacks its value"),
        ("--steps 5", "--steps is not an option of launch/slurm.sh"),
    ],
)
def test_a_wrong_word_is_said_before_anything_is_submitted(job: Job, words: str, says: str) -> None:
    command = (LAUNCH / "slurm.sh", "--config", job.file, "--run", job.run, *words.split())
    done = job.slurm.run(*command)
    assert the_error(done.returncode, done.stderr).startswith(says)
    assert done.stdout == ""
    assert not job.slurm.run("squeue", "--noheader").stdout


def test_what_would_be_submitted(job: Job) -> None:
    """Without further words: a node of the default partition, with all it has."""
    for script in ("slurm.sh", "slurm.sbatch"):
        assert "Usage: " in job.slurm.run(LAUNCH / script, "--help").stdout
    done = job.slurm.run(LAUNCH / "slurm.sh", "--config", job.file, "--run", job.run, "--dry-run")
    assert "--nodes 1 --signal B:USR1@180 --partition cpu --gpus-per-node 2 --exclusive --mem 0" in done.stdout
    assert not job.run.exists()
    done = job.slurm.run(LAUNCH / "slurm.sbatch", "--config", job.file, "--run", job.run)
    assert the_error(done.returncode, done.stderr).startswith("this is a job for Slurm; write sbatch")


def test_a_plain_start_in_an_interactive_shell(slurm: Slurm, job: Job) -> None:
    """One process, whatever was allocated; several that srun starts, and that know nothing of each other, are refused.
    ``salloc`` gives its shell the allocation's number of tasks; on many clusters that shell is a step of its own."""
    plain = ("python", "-m", "inrank_dist", "train", "--config", job.file, "--run.dir", job.run, "--dry-run")
    # As LaunchParameters=use_interactive_step starts the shell.
    step = ("srun", "--interactive", "--preserve-env", "--mpi=none")
    for words in (plain, (*step, *plain)):
        done = slurm.run("salloc", "--nodes", 2, "--ntasks", 2, *words)
        assert done.returncode == 0, done.stderr
        assert "parameters" in done.stdout
    done = slurm.run("srun", "--nodes", 2, "--ntasks", 2, *plain)
    assert done.returncode != 0
    assert "srun started 2 tasks but not WORLD_SIZE; write srun torchrun, one task per node" in done.stderr
