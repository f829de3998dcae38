"""What is said of ranks: each with the share that it explains, means that fit the lines around them, and no rank that
the rule did not find passed off as a finding."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from runs import small_config

from inrank_dist.commands.main import main
from inrank_dist.report import write_report
from inrank_dist.report.chart import Charts
from inrank_dist.report.heatmap import COLUMNS, heat_maps, row_height, spans
from inrank_dist.report.history import History
from inrank_dist.report.timeline import timeline
from inrank_dist.train.monitors import ConsoleMonitor
from inrank_dist.train.monitors.ranks import RankTable

NAMES = [f"blocks.{block}.mlp.{leaf}" for block in range(2) for leaf in ("up", "down")]


def start() -> dict[str, Any]:
    return {"kind": "start", "step": 0, "ranks": dict.fromkeys(NAMES, 8), "initial_rank": 8, "threshold": 0.9}


def check(step: int, **layers: tuple[int, int, float]) -> dict[str, Any]:
    """Names with ``_`` for ``.`` -> rank, found, share that the rank explains; other layers stay at 8."""
    entries = {}
    for name in NAMES:
        rank, found, reached = layers.get(name.replace(".", "_"), (8, 8, 0.95))
        entries[name] = {"rank": rank, "found": found, "explained": 0.5, "reached": reached, "null_rank": 31}
        entries[name]["limit"] = "lowrank.multiple_of 4" if reached < 0.9 else None
    return {"kind": "rank_check", "step": step, "seconds": 0.1, "threshold": 0.9, "layers": entries}


def event(step: int, action: str, before: dict[str, int], told: dict[str, Any]) -> dict[str, Any]:
    layers = {}
    for name, rank in before.items():
        entry = dict(told["layers"][name])
        layers[name] = {"from": rank, "to": entry.pop("rank"), **entry}
    return {"kind": "rank_event", "step": step, "action": action, "seconds": 0.1, "threshold": 0.9, "layers": layers}


GROWN = check(10, blocks_0_mlp_up=(12, 12, 0.91))
FROZEN = check(20, blocks_0_mlp_up=(8, 13, 0.85), blocks_0_mlp_down=(4, 5, 0.93))
RECORDS = [
    start(),
    GROWN,
    event(10, "grow", {NAMES[0]: 8}, GROWN),
    {"kind": "step", "step": 10, "loss": 3.0, "tokens": 1},
    FROZEN,
    event(20, "freeze", {**dict.fromkeys(NAMES, 8), NAMES[0]: 12}, FROZEN),
    {"kind": "step", "step": 20, "loss": 3.0, "tokens": 1},
]


def test_the_lines_of_events_are_means_over_all_layers(capsys: pytest.CaptureFixture[str]) -> None:
    console = ConsoleMonitor(20)
    for record in RECORDS:
        console.write(record)
    lines = capsys.readouterr().out.splitlines()
    grow = next(line for line in lines if "grow:" in line)
    assert "mean rank 8.0 -> 9.0 (1 of 4 layers, null rank 31.0, explained 0.94)" in grow
    assert "in 3 of 4 layers the rank never left initial_rank 8: pinned by its start" in grow
    assert "rank 9.0 (null 31.0, 3 pinned)" in lines[lines.index(grow) + 1]
    freeze = next(line for line in lines if "freeze:" in line)
    assert "mean rank 9.0 -> 7.0 (4 of 4 layers, found 8.5, null rank 31.0, explained 0.92)" in freeze
    assert "explains less than threshold 0.9: lowrank.multiple_of 4 cuts it; a smaller value keeps more" in freeze
    assert "in 2 of 4 layers the rank never left initial_rank 8" in freeze


def test_the_report_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    page = write_report(tmp_path).read_text()
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "grow 1 of 4 8.0 → 9.0 9.0 31.0 0.940" in text
    assert "freeze 4 of 4 9.0 → 7.0 8.5 31.0 0.920" in text
    assert "2 of 4 = start 1 of 4 cut below the threshold" in text
    assert "blocks.0.mlp.up - 8 13 31 &lt; 0.9 0.850" in text
    assert "blocks.1.mlp.down - 8 8 31 = start 0.950" in text
    assert "In 2 of 4 layers the rank never left lowrank.initial_rank, 8" in text
    assert "In 1 of 4 layers the freeze kept less than the rule had found" in text


def test_old_records_without_pairs_are_not_called_below_the_threshold() -> None:
    """``explained`` alone is of the rank before the decision, which is below the threshold whenever a layer grows."""
    table = RankTable()
    table.update(start())
    layers = {name: {"rank": 9, "explained": 0.5, "null_rank": 31} for name in NAMES}
    table.update({"kind": "rank_check", "step": 1, "layers": layers})
    assert table.notes() == [] and table.flags(NAMES[0]) == []


def test_a_resumed_run_knows_what_was_found_and_measured(capsys: pytest.CaptureFixture[str]) -> None:
    known = {"rank": 8, "found": 13, "null_rank": 31, "reached": 0.85}
    console = ConsoleMonitor(20)
    console.write({**start(), "step": 20, "rank_table": dict.fromkeys(NAMES, known)})
    assert "mean rank 8.0 (found 13.0, null rank 31.0, explained 0.85)" in capsys.readouterr().out


def test_no_rank_is_pinned_where_the_freeze_could_lower_it() -> None:
    table = RankTable()
    for record in (start(), GROWN):
        table.update(record)
    assert len(table.pinned_layers) == 3
    table.update({**FROZEN, "shrinks": True})
    assert table.pinned_layers == []
    resumed = RankTable()
    known = {"rank": 8, "found": 8, "null_rank": 31, "reached": 0.95}
    resumed.update({**start(), "rank_table": dict.fromkeys(NAMES, known), "shrinks": True})
    assert resumed.pinned_layers == []


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which some layers are pinned and the freeze cuts others."""
    folder = tmp_path_factory.mktemp("ranks")
    changes = {"lowrank__initial_rank": 4, "lowrank__buffer": 4, "lowrank__multiple_of": 4, "lowrank__final": "budget"}
    config = small_config(corpus, run__dir=folder / "run", lowrank__final_budget=0.12, **changes)
    (folder / "config.yaml").write_text(config.to_yaml())
    assert main(["train", "--config", str(folder / "config.yaml")]) == 0
    return folder / "run"


def test_log_summary_and_inspect_pair_a_rank_with_one_ratio(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    freeze = next(record for record in records if record.get("action") == "freeze")["layers"]
    summary = records[-1]["ranks"]
    capsys.readouterr()
    assert main(["inspect", "--run", str(run)]) == 0
    out = capsys.readouterr().out
    below = [name for name, layer in freeze.items() if layer["reached"] < 0.995]
    assert below, "the budget cuts"
    for name, layer in freeze.items():
        assert summary[name]["rank"] == layer["to"] and summary[name]["reached"] == layer["reached"]
        row = next(line for line in out.splitlines() if line.startswith(name))
        assert row.split()[5] == str(layer.get("found", layer["to"]))
        assert row.split()[8] == f"{layer['reached']:.3f}"
        assert ("< 0.995" in row) == (name in below)
    told = RankTable()
    told.update(records[-1])
    assert any("lowrank.final_budget 0.12 cuts it; a larger value keeps more" in note for note in told.notes())
    last = max(record["step"] for record in records if record["kind"] == "rank_check")
    assert f"found and explained: at the last decision on rank, step {last}; eff. rank: of U V^T at step" in out
    assert told.notes() and all(note in out for note in told.notes())


def test_a_rows_spans_are_few_and_end_with_the_run() -> None:
    points: list[tuple[float, float | None]] = [(float(step), float(step)) for step in range(10_000)]
    cut = spans(points, 20_000)
    assert len(cut) <= COLUMNS and cut[0][0] == 0 and cut[-1][1:] == (20_000, 9999.0)
    assert all(before[1] == after[0] for before, after in pairwise(cut))
    assert spans([(0, 8.0), (10, 9.0)], 20) == [(0, 10, 8.0), (10, 20, 9.0)]


@pytest.mark.parametrize("layers", [1, 24, 216, 1000])
def test_the_heat_maps_fit_a_page_with_any_number_of_layers(layers: int) -> None:
    """Every layer has its row in every map, and the rank, the rank found and the null rank over the steps."""
    names = [f"blocks.{i // 2}.mlp.{'up' if i % 2 else 'down'}" for i in range(layers)]
    told = {
        name: {"rank": 9 + i, "found": 8 + i, "explained": 0.5, "reached": 0.8, "null_rank": 31, "effective_rank": 2.5}
        for i, name in enumerate(names)
    }
    history = History(
        [
            {"kind": "start", "step": 0, "ranks": dict.fromkeys(names, 8)},
            {"kind": "rank_check", "step": 5, "layers": told},
            {"kind": "step", "step": 10},
        ]
    )
    charts = Charts([timeline("run", history)])
    figures = heat_maps(charts, history)
    assert re.findall("<bdi>([^<]*)</bdi>", figures) == [
        "Rank of every layer",
        "Rank found",
        "Explained ratio",
        "Effective rank",
    ]
    assert "8, the start" in figures and (f"9 to {8 + layers:,}" in figures or layers == 1)
    heights = [float(height) for height in re.findall(r"min-height:(\d+)px", figures)]
    assert max(heights) <= max(800, 2 * layers + 100) and layers * row_height(layers) <= max(720, 2 * layers)
    data = re.findall('id="page-data">(.*?)</script>', charts.script())
    (drawn,) = json.loads(data[0])["maps"]
    at = [layer["name"] for layer in drawn["layers"]].index(names[-1])
    rank, found, explained, effective = (each["rows"][at] for each in drawn["quantities"])
    assert rank == {"x": [0, 5], "v": [8, 8 + layers]} and found == {"x": [5], "v": [7 + layers]}
    assert explained["v"] == [0.8] and effective["v"] == [2.5] and drawn["nulls"][at]["v"] == [31]


def test_means_hold_each_layers_value_until_its_next_one() -> None:
    history = History(RECORDS)
    assert history.means["rank"] == [(0, 8.0), (10, 9.0), (20, 7.0)]
    assert history.layers[NAMES[0]].rank == [(0, 8.0), (10, 12.0), (20, 8.0)]


def test_a_budget_that_nothing_fits_into_is_refused_before_the_run(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(corpus, run__dir=tmp_path / "run", lowrank__final="budget", lowrank__final_budget=0.0001)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 2
    assert capsys.readouterr().err == (
        "error: lowrank.final_budget is 0.0001 but rank 1 in every factored layer already takes 0.047 of their dense "
        "parameters; write at least 0.0469\n"
    )
    assert not (tmp_path / "run").exists()
