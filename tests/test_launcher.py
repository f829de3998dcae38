"""What ``launch/torchrun.sh`` decides before it starts a process, and the judgement on nodes."""

import socket
from itertools import chain
from pathlib import Path

import pytest
from runs import small_config

from inrank_dist.bench.nodes import Node, Report, ring
from inrank_dist.launcher import network, torchrun
from inrank_dist.runtime.errors import UserError


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("node1", ("node1", 29400)),
        ("node-1.cluster:29500", ("node-1.cluster", 29500)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("fd00::1", ("fd00::1", 29400)),
        ("[fd00::1]", ("fd00::1", 29400)),
        ("[fd00::1]:29500", ("fd00::1", 29500)),
    ],
)
def test_where_nodes_meet(text: str, place: tuple[str, int]) -> None:
    assert network.split_endpoint(text) == place


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "no command; write launch/torchrun.sh [-n PROCESSES] COMMAND, such as train --config FILE"),
        ("-n 0 train", "-n is 0; write a number of processes of at least 1"),
        ("-n two train", "argument -n: invalid int value: 'two'; see launch/torchrun.sh --help"),
        ("-N 2 train", "-N is 2 but -m is missing; write -m HOST, the name or address of one of the nodes"),
        ("-N 4:1 -m n1 train", "-N is 4:1; write a number of nodes such as 4, or a range such as 1:4"),
        ("-N x -m n1 train", "-N is x; write a number of nodes such as 4, or a range such as 1:4"),
        (
            "-N 2 -m n1:x train",
            "'n1:x' is not a rendezvous endpoint; write HOST or HOST:PORT, such as node1:29400 or [fd00::1]",
        ),
        ("-N 2 -m n1:70000 train", "the port of n1:70000 is 70000; write a port from 1 to 65535"),
        ("-N 2 -m n1 -k 2 train", "-k is 2 and -N is 2; -k numbers a fixed number of nodes from 0"),
        ("-N 1:2 -m n1 -k 0 train", "-k is 0 and -N is 1:2; -k numbers a fixed number of nodes from 0"),
        ("-N 2 -m n1 -w 0 train", "-w is 0; write a number of seconds of at least 1"),
        ("-r -1 train", "-r is -1; write 0 or more"),
    ],
)
def test_a_wrong_word_is_told_in_one_line(capsys: pytest.CaptureFixture[str], words: str, said: str) -> None:
    assert torchrun.main(words.split()) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_a_host_or_an_interface_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"cannot resolve the host name no\.such\.invalid .*; write its address instead"
    ):
        network.settings_for("no.such.invalid", 1)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    with pytest.raises(
        UserError, match=r"GLOO_SOCKET_IFNAME is eth77, but .* has no interface eth77; write lo, or unset"
    ):
        network.settings_for("127.0.0.1", 1)


@pytest.mark.parametrize(
    ("known", "own", "address"),
    [
        (["127.0.1.1"], ["10.0.0.1"], "10.0.0.1"),
        (["::1", "fe80::1", "10.0.0.1"], ["10.0.0.1"], "10.0.0.1"),
        (["10.0.0.1", "192.168.0.1"], ["10.0.0.1", "192.168.0.1"], "10.0.0.1"),
        (["127.0.1.1"], ["10.0.0.1", "192.168.0.1"], "share, one of 10.0.0.1, 192.168.0.1"),
        (["127.0.1.1"], [], "node1 is 127.0.1.1 on .*, which no other node can reach; write its address"),
    ],
)
def test_a_node_that_knows_its_own_name_as_loopback(
    monkeypatch: pytest.MonkeyPatch, known: list[str], own: list[str], address: str
) -> None:
    """As Debian writes it into /etc/hosts; no other node reaches it there."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (each, 0)) for each in known])
    monkeypatch.setattr(network, "_local_addresses", lambda: own)
    if "." in address and " " not in address:
        assert network.resolve("node1") == address
    else:
        with pytest.raises(UserError, match=address):
            network.resolve("node1")


def test_interface_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user has set stays; Slurm's cores are shared among the processes."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "24")
    loopback = network.interface_of("127.0.0.1")
    assert network.settings_for("127.0.0.1", 8) == {"GLOO_SOCKET_IFNAME": loopback, "OMP_NUM_THREADS": "3"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    settings = network.settings_for("127.0.0.1", 8)
    assert settings == {"GLOO_SOCKET_IFNAME": loopback}
    line = network.describe_settings(settings)
    assert line == f"{socket.gethostname()}: GLOO_SOCKET_IFNAME {loopback}, OMP_NUM_THREADS 5 (given)"


def test_an_elastic_job_needs_a_batch_that_every_size_divides(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would end when the third of four nodes came or left."""
    (tmp_path / "config.yaml").write_text(small_config(corpus).to_yaml())
    words = ["-n", "1", "-N", "1:4", "-m", "localhost", "train", "--config", str(tmp_path / "config.yaml")]
    assert torchrun.main(words) == 2
    assert capsys.readouterr().err == (
        "error: train.global_batch_size is 8, which not every number of nodes from 1 to 4 divides (1 process each, "
        "train.micro_batch_size 2); write -N 1:2, or a train.global_batch_size that is a multiple of 24\n"
    )


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 7, 128])
def test_the_ring_of_nodes(nodes: int) -> None:
    """Every link once, no node twice in a round, and few rounds."""
    rounds = list(ring(nodes))
    links = {frozenset(link) for link in chain(*rounds)}
    expected = {frozenset((i, (i + 1) % nodes)) for i in range(nodes)} if nodes > 1 else set()
    assert links == expected
    assert len(rounds) <= 3
    for each in rounds:
        ends = list(chain(*each))
        assert len(set(ends)) == len(ends)


def test_who_is_slow() -> None:
    usual = {"processes": 8, "product": 0.010, "link": 0.002}
    nodes = [Node(f"n{i}", **usual) for i in range(6)]  # type: ignore[arg-type]
    assert Report(nodes).slow() == []
    nodes[2].product = 0.030
    assert Report(nodes).slow() == ["n2 computes slowly: 3.0 times as long as the usual node"]
    nodes[2].product = 0.010
    nodes[3].link = nodes[4].link = 0.008
    assert Report(nodes).slow() == ["n4 sends slowly: 4.0 times as long as usual to both of its neighbours"]
    nodes[3].link = 0.002
    assert Report(nodes).slow() == ["the link n4 - n5 is slow: 4.0 times as long as usual"]
    pair = [Node("a", 1, 0.01, 0.002), Node("b", 1, 0.02)]
    assert Report(pair).slow() == ["b computes slowly: 2.0 times as long as the usual node"]
