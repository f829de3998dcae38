"""Several hosts on a real network: each in a network namespace, with its own name, interfaces and addresses."""

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster_tools import Program, job_config, listens_beyond_loopback, wait_until
from faults import Fault
from network_rig import TORCHRUN, Host, lab
from runs import tensor_bytes
from sharing import nightly

from inrank_dist.train.checkpoint import list_checkpoints

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with lab(3) as hosts:
        yield hosts


@pytest.fixture(autouse=True)
def quiet(hosts: list[Host]) -> Iterator[None]:
    """A test leaves nothing running and no cable pulled."""
    yield
    for host in hosts:
        host.kill()
        host.mend()


@pytest.fixture
def pair(hosts: list[Host]) -> list[Host]:
    return hosts[:2]


def together(hosts: list[Host], folder: Path, *words: Any, program: tuple[Any, ...] = (TORCHRUN,)) -> list[Program]:
    """The same command on every host."""
    return [host.start(folder / f"{host.name}.log", *program, *words) for host in hosts]


def losses_of(run: Path) -> list[tuple[int, float]]:
    """Steps and their losses, as far as the run has come."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [(record["step"], record["loss"]) for record in map(json.loads, lines) if record["kind"] == "step"]


def steps_of(run: Path) -> list[int]:
    return [step for step, _ in losses_of(run)]


@pytest.mark.parametrize("engine", ["fsdp", nightly("zero2")])
def test_a_cable_is_pulled_in_the_middle_of_a_rank_event(
    corpus: Path, tmp_path: Path, pair: list[Host], engine: str
) -> None:
    """Both nodes end within the time-out and say why; the same command then ends as if nothing had been."""
    settings: dict[str, Any] = {
        "parallel__engine": engine, "parallel__timeout_seconds": 15, "parallel__step_timeout_seconds": 10,
        "checkpoint__interval": 4,
    }  # fmt: skip
    first, second = pair
    _, file = job_config(corpus, tmp_path / "undisturbed", **settings)
    meet = ("-N", 2, "-n", 1, "-m", f"{first.address}:29501", "-w", 60)
    for program in together(pair, tmp_path / "undisturbed", *meet, "train", "--config", file):
        assert program.wait(120) == 0, program.text

    config, file = job_config(corpus, tmp_path / "cut", **settings)
    fault = Fault("pause", 1, 16, "decision", str(tmp_path / "fired"))
    command = ("python", "-m", "faults.torchrun", fault.to_json())
    programs = together(pair, tmp_path / "cut", *meet, "train", "--config", file, program=command)
    wait_until((tmp_path / "fired").exists, 90, lambda: [program.text for program in programs])
    # Process 1 stands where it would add up its Grams; process 0 waits for them.
    second.cut()
    (tmp_path / "fired.go").touch()
    assert programs[0].wait(15 + 30) == 1, programs[0].text
    assert programs[1].wait(15 + 75) == 1, programs[1].text
    for program in programs:
        (line,) = [line for line in program.text.splitlines() if " network " in line and line.startswith("process ")]
        assert "lost another process" in line or "does not answer" in line
    assert f"error: lost the network to {first.address}:29501" in programs[1].text  # else torch's agent would hang
    assert [checkpoint.name for checkpoint in list_checkpoints(config.run.folder)][-1] == "step-00000012"
    assert max(steps_of(config.run.folder)) < 16

    second.mend()
    for program in together(pair, tmp_path / "cut", *meet, "train", "--config", file, program=command):
        assert program.wait(120) == 0, program.text
    assert "resumed at step 12 on 2 processes" in (tmp_path / "cut" / "host0.log").read_text()
    assert tensor_bytes(config.run.folder) == tensor_bytes(tmp_path / "undisturbed" / "run")
    assert steps_of(config.run.folder) == list(range(1, 31))


@pytest.mark.nightly
def test_a_node_leaves_an_elastic_job_and_comes_back(corpus: Path, tmp_path: Path, pair: list[Host]) -> None:
    """The other one goes on alone, then with it again; every step is made once, with nearly the same losses."""
    settings: dict[str, Any] = {
        "train__steps": 200, "train__global_batch_size": 64, "lowrank__warmup_steps": 120, "lowrank__interval": 40,
        "schedule__warmup_steps": 10,
    }  # fmt: skip
    config, file = job_config(corpus, tmp_path / "elastic", **settings, checkpoint__interval=10)
    words = ("-N", "1:2", "-n", 1, "-m", pair[0].address, "-w", 10, "train", "--config", file)
    first, _ = together(pair, tmp_path / "elastic", *words)

    def reaches(step: int) -> None:
        wait_until(lambda: max(steps_of(config.run.folder), default=0) >= step, 300, lambda: first.text)

    reaches(25)
    pair[1].kill()
    wait_until(lambda: "on 1 process\n" in first.text, 300, lambda: first.text)
    again = pair[1].start(tmp_path / "elastic" / "again.log", TORCHRUN, *words)
    assert first.wait(400) == 0, first.text
    assert again.wait(120) == 0, again.text
    *_, alone, both = [line for line in first.text.splitlines() if "resumed at step" in line]
    assert alone.endswith("on 1 process") and both.endswith("on 2 processes")
    assert steps_of(config.run.folder) == list(range(1, 201))

    undisturbed, file = job_config(corpus, tmp_path / "undisturbed", **settings)
    program = pair[0].start(tmp_path / "undisturbed.log", TORCHRUN, "-n", 1, "train", "--config", file)
    assert program.wait(400) == 0, program.text
    losses, wanted = ([loss for _, loss in losses_of(each.run.folder)] for each in (config, undisturbed))
    assert max(abs(a - b) for a, b in zip(losses[:100], wanted[:100], strict=True)) < 1e-3
    assert abs(losses[-1] - wanted[-1]) < 0.02


def test_ipv6_and_a_late_first_node(corpus: Path, tmp_path: Path, pair: list[Host]) -> None:
    """Each node finds its own interface to the others; one that comes before the first waits and says so."""
    config, file = job_config(corpus, tmp_path / "late", checkpoint__interval=0)
    words = ("-N", 2, "-n", 1, "-m", f"[{pair[0].address6}]:29502", "-w", 90, "train", "--config", file)
    second = pair[1].start(tmp_path / "second.log", TORCHRUN, *words)
    wait_until(lambda: f"host1: waiting for {pair[0].address6}:29502" in second.text, 60, lambda: second.text)
    first = pair[0].start(tmp_path / "first.log", TORCHRUN, *words)
    for program, host in ((first, pair[0]), (second, pair[1])):
        assert program.wait(120) == 0, program.text
        assert f"{host.name}: GLOO_SOCKET_IFNAME {host.interface}, NCCL_SOCKET_IFNAME ={host.interface}" in program.text
    assert "on 2 processes (cpu, fsdp" in first.text
    assert steps_of(config.run.folder) == list(range(1, 31))


def test_a_signal_on_one_node_stops_all(corpus: Path, tmp_path: Path, pair: list[Host]) -> None:
    """Both launchers end with 75, and the run is saved."""
    config, file = job_config(corpus, tmp_path / "job", train__steps=100_000, checkpoint__interval=0)
    words = ("-N", 2, "-n", 1, "-m", pair[0].address, "train", "--config", file)
    programs = together(pair, tmp_path / "job", *words)
    wait_until(lambda: len(steps_of(config.run.folder)) > 20, 90, lambda: programs[0].text)
    for host, program in zip(pair, programs, strict=True):
        # torch's store has no authentication: it is not to be reached through the other network.
        own = f"{int.from_bytes(socket.inet_aton(host.address), 'little'):08X}"
        started = psutil.Process(program.process.pid).children(recursive=True)
        seen = {address.partition(":")[0] for process in started for address in listens_beyond_loopback(process.pid)}
        assert seen <= {own, f"{'0' * 16}FFFF0000{own}"}, (host.name, seen)
        assert seen or host is pair[1]
    programs[1].process.send_signal(signal.SIGUSR1)
    assert [program.wait(60) for program in programs] == [75, 75], [program.text for program in programs]
    assert "stopped; the same command goes on from there" in programs[0].text
    assert len(list_checkpoints(config.run.folder)) == 1


def test_a_node_that_never_comes(corpus: Path, tmp_path: Path, pair: list[Host]) -> None:
    """Whoever waits says for whom, and what to look at."""
    _, file = job_config(corpus, tmp_path / "never")
    words = ("-N", 2, "-n", 1, "-m", pair[0].address, "-w", 5, "train", "--config", file)
    second = pair[1].start(tmp_path / "second.log", TORCHRUN, *words)
    assert second.wait(60) == 1
    assert second.text.splitlines()[-1] == (
        f"error: host1 found nobody at {pair[0].address}:29400 within 5 s (-w); start the same command on "
        f"{pair[0].address} as well, and check that no firewall blocks the port"
    )
    first = pair[0].start(tmp_path / "first.log", TORCHRUN, *words)
    assert first.wait(60) == 1
    assert first.text.splitlines()[-1].startswith(f"error: not all 2 nodes met at {pair[0].address}:29400 within 5 s")
    assert not (tmp_path / "never" / "run").exists()


def test_a_host_that_no_network_leads_to(tmp_path: Path, pair: list[Host]) -> None:
    program = pair[0].start(tmp_path / "log", TORCHRUN, "-N", 2, "-m", "192.0.2.1", "train")
    assert program.wait(60) == 2
    assert program.text == (
        "error: host0 has no route to 192.0.2.1 (Network is unreachable); write an address of the network that the "
        "nodes share, or fix the route\n"
    )


def test_which_node_is_slow(tmp_path: Path, hosts: list[Host]) -> None:
    """The health check before a job, on three hosts of which one has a slow network card."""
    words = ("-N", 3, "-n", 1, "-m", hosts[0].address, "bench", "nodes", "--repeats", 3)
    for program in together(hosts, tmp_path, *words):
        assert program.wait(120) == 0, program.text
    told = (tmp_path / "host0.log").read_text()
    assert "all-reduce of 1 MiB over 3 processes: " in told
    assert all(f"\n{host.name} " in told for host in hosts)
    (tmp_path / "host0.log").unlink()
    limit = ("root", "tbf", "rate", "100mbit", "burst", "64k", "latency", "1s")
    subprocess.run(
        ["tc", "-n", hosts[2].space, "qdisc", "add", "dev", hosts[2].interface, *limit], check=True, timeout=30
    )
    for program in together(hosts, tmp_path, *words):
        assert program.wait(120) == 0, program.text
    told = (tmp_path / "host0.log").read_text()
    assert "warning: host2 sends slowly: " in told and "is slow" not in told
