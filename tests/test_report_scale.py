"""A report takes time in proportion to the run, belongs to nobody's watch, and cannot make a finished run fail."""

import json
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from runs import small_config

from inrank_dist.commands import train
from inrank_dist.commands.main import main
from inrank_dist.report import write_report
from inrank_dist.runtime import watch

LAYERS = [f"blocks.{block}.mlp.{leaf}" for block in range(6) for leaf in ("up", "down")]


def long_run(folder: Path, checks: int) -> Path:
    """A run of two steps a check, in which every third check grows a layer."""
    ranks = dict.fromkeys(LAYERS, 8)
    records: list[dict[str, Any]] = [{"kind": "start", "step": 0, "ranks": ranks.copy()}]
    for check in range(1, checks + 1):
        step = 2 * check
        records += [{"kind": "step", "step": number, "loss": 3.0, "tokens": number} for number in (step - 1, step)]
        grows = check % 3 == 0
        changes = {}
        if grows:
            name = LAYERS[check % len(LAYERS)]
            changes = {name: {"from": ranks[name], "to": ranks[name] + 1, "explained": 0.8, "null_rank": 31}}
            ranks[name] += 1
        layers = {
            name: {"rank": rank, "explained": 0.9, "null_rank": 31, "effective_rank": 5.0}
            for name, rank in ranks.items()
        }
        records.append({"kind": "rank_check", "step": step, "seconds": 0.1, "layers": layers})
        if changes:
            records.append({"kind": "rank_event", "step": step, "action": "grow", "seconds": 0.1, "layers": changes})
        records.append({"kind": "eval", "step": step, "loss": 3.0, "perplexity": 20.0})
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def lines_run(folder: Path) -> int:
    """Lines of Python that making a report runs, each turn of a loop counted: work without a clock."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        write_report(folder)
    finally:
        sys.settrace(before)
    return count


def test_the_work_of_a_report_grows_as_the_run_does(tmp_path: Path) -> None:
    """Of a run of 14,000 checks of 12 layers it once took over 12 minutes."""
    short, long = (lines_run(long_run(tmp_path / str(checks), checks)) for checks in (100, 400))
    assert long < 4.4 * short


@pytest.fixture
def command(corpus: Path, tmp_path: Path) -> list[str]:
    config = small_config(corpus, run__dir=tmp_path / "run", train__steps=2, lowrank__warmup_steps=2)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    return ["train", "--config", str(tmp_path / "config.yaml")]


def test_a_report_that_cannot_be_written_does_not_fail_a_finished_run(
    command: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    assert main(command) == 0
    assert "the run is complete, but its report was not written" in caplog.text
    assert f"inrank report --run {tmp_path / 'run'}" in caplog.text
    (tmp_path / "run" / "report.html").rmdir()
    assert main(command) == 0, "complete already; only the report is missing"
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_report_is_made_when_nobody_watches_any_more(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take as long as it likes: a finished run was once reported as hanging."""
    watches: list[watch.Watch | None] = []

    def write(folder: Path) -> Path:
        watches.append(watch.current())
        return write_report(folder)

    monkeypatch.setattr(train, "write_report", write)
    assert main(command) == 0
    assert watches == [None]
