"""``inrank bench decision`` must measure what training does, find the published route's ranks, and say what it did."""

import json
from pathlib import Path

import pytest
import torch
from runs import Fails

from inrank_dist.bench.decision import ModelShape, Result, Workload, measure_decision, sample_layers
from inrank_dist.bench.decision_table import as_record, notes
from inrank_dist.commands import bench as command
from inrank_dist.commands.main import main
from inrank_dist.runtime.context import Context
from inrank_dist.train.memory import peak_extra_bytes

TINY = ModelShape("tiny", 3, 33)
CPU = torch.device("cpu")
MIB = 2**20


def measured(dense_layers: int | None = None, repeats: int = 2) -> Result:
    result = measure_decision(TINY, Workload(6, 8, repeats, dense_layers), Context())
    assert result
    return result


def in_each_process() -> Result | None:
    """For the workers of the pool."""
    context = Context()
    context.start(30)
    result = measure_decision(TINY, Workload(6, 8, 1, None), context)
    context.stop()
    return result


def test_both_routes_find_the_same_ranks_and_the_ranks_say_something() -> None:
    result = measured()
    assert result.ours == result.dense
    assert list(result.ours) == list(TINY.layers)
    assert result.different == {}
    # A rule that always answered the lowest or the highest rank would compare nothing.
    assert all(6 <= rank <= 14 for rank in result.ours.values())
    assert len(set(result.ours.values())) > 1


def test_dense_route_is_measured_on_whole_blocks_and_extrapolated_by_their_number() -> None:
    result = measured(dense_layers=2, repeats=3)
    assert list(result.dense) == ["blocks.0.mlp.up", "blocks.0.mlp.down"]
    assert result.extrapolated
    up, down = result.dense_seconds.values()
    assert result.dense_whole == pytest.approx([3 * (a + b) for a, b in zip(up, down, strict=True)])
    assert len(result.dense_whole) == len(result.ours_seconds) == 3
    assert not measured().extrapolated


def test_samples_are_spread_and_never_more_than_there_are() -> None:
    layers = [f"{block}{part}" for block in range(6) for part in "ud"]
    assert sample_layers(layers, 4) == ["0u", "0d", "3u", "3d"]
    assert sample_layers(layers, 12) == sample_layers(layers, 100) == sample_layers(layers, None) == layers


@pytest.mark.slow
def test_processes_with_their_rows_find_the_ranks_of_one(pool) -> None:
    first, second = pool.run("test_bench:in_each_process", world_size=2)
    assert first.ours == first.dense == measured().ours
    assert second is None


def test_a_layer_where_the_routes_differ_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Found without help only where a threshold falls between two roundings; here the float32 spectrum loses its tail.
    exact = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda m: exact(m) * (1 if m.dtype == torch.float64 else flat(m)))
    result = measured()
    assert result.different
    name, (ours, dense) = next(iter(result.different.items()))
    lines = list(notes([result], Workload(6, 8, 2, None), Context()))
    assert f"tiny: ranks differ in {name}: {ours} by Grams, {dense} by the float32 SVD" in lines
    assert as_record([result], Workload(6, 8, 2, None), Context())["shapes"][0]["ranks_equal"] is False


def flat(matrix: torch.Tensor) -> torch.Tensor:
    return (torch.arange(min(matrix.shape)) < 6).float()


def test_memory_counts_the_peak_and_not_what_was_there_before() -> None:
    before = torch.zeros(3 * MIB)  # freed while counting: must not be subtracted

    def work() -> torch.Tensor:
        nonlocal before
        first = torch.zeros(2 * MIB, dtype=torch.uint8)
        second = first + 1
        del first
        before = torch.zeros(1)
        third = second[: MIB // 2].clone()
        return third + 1

    assert peak_extra_bytes(work, CPU) == pytest.approx(4 * MIB, abs=1000)


def test_memory_counts_the_copy_that_is_handed_to_lapack() -> None:
    # Invisible from Python; the dense route would look half as large without it.
    matrix = torch.randn(64, 256)
    assert peak_extra_bytes(lambda: torch.linalg.svdvals(matrix), CPU) >= matrix.nbytes


def test_memory_says_nothing_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    peak_extra_bytes(lambda: torch.zeros(8), CPU)
    assert capfd.readouterr().err == ""


def test_dense_route_holds_the_product_twice() -> None:
    result = measured()
    product = 4 * 33 * 132
    assert 2 * product <= result.dense_bytes < 3 * product
    assert 0 < result.ours_bytes_layer < result.ours_bytes


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes by name are too large for a test."""
    shapes = {"tiny": TINY, "tinier": ModelShape("tinier", 2, 24)}
    monkeypatch.setattr(command, "SHAPES", shapes)


@pytest.mark.usefixtures("tiny")
def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "decision", "--rank", "6", "--buffer", "8", "--repeats", "2", "--dense-layers", "4", "--json"]
    assert main([*words, str(tmp_path / "decision.json")]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("tin") and ":" not in line}
    assert list(rows) == ["tiny", "tinier"]
    assert rows["tiny"].split()[1:6] == ["6", "132", "x", "33", "14"]
    assert rows["tiny"].endswith("4 of 4")
    assert "~" in rows["tiny"]
    assert "~" not in rows["tinier"]
    assert "tiny: ~ the dense method was measured on 4 of 6 layers" in out
    assert "tinier: ~" not in out

    written = json.loads((tmp_path / "decision.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["decision.json"]
    assert (written["processes"], written["threads"], written["torch"]) == (1, 1, torch.__version__)
    first, second = written["shapes"]
    assert (first["shape"], first["layers"], first["modes"]) == ("tiny", 6, 14)
    assert (first["dense_extrapolated"], second["dense_extrapolated"]) == (True, False)
    assert first["ranks_equal"]
    assert first["dense_ranks"].items() <= first["ours_ranks"].items()
    assert len(first["ours_seconds"]) == len(first["dense_seconds"]) == 2
    assert min(first[key] for key in ("share", "ours_bytes", "ours_bytes_layer", "dense_bytes")) > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("decisions", "invalid choice: 'decisions'"),
        ("decision --shapes small,huge", "--shapes has 'huge'; write a comma-separated list of small, medium, large"),
        ("decision --shapes ,", "--shapes has ''"),
        ("decision --rank 0", "--rank is 0"),
        ("decision --rank two", "--rank: invalid int value: 'two'"),
        ("decision --buffer -1", "--buffer is -1"),
        ("decision --repeats 0", "--repeats is 0"),
        ("decision --dense-layers 3", "--dense-layers is '3'; write an even number"),
        ("decision --dense-layers none", "--dense-layers is 'none'"),
        ("decision --rank 400", "of small have min(in, out) = 768; write a rank of at most 384"),
        ("decision --shapes large,medium --buffer 900", "of medium have min(in, out) = 1024"),
        ("decision --json .", "--json is ., which is a folder"),
        ("decision --json no/such/file", "--json is no/such/file, but no/such is no folder"),
        ("decision --shape small", "'--shape'"),
        ("decision small", "'small'"),
    ],
)
def test_mistakes_are_one_line(fails: Fails, words: str, says: str) -> None:
    assert says in fails("bench", *words.split())


def test_help_lists_the_subject_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "decision", "--help"])
    assert "--dense-layers" in capsys.readouterr().out
