"""The monitors: what a reader of a run's records may rely on, also after a kill and a resume."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inrank_dist.runtime.errors import UserError
from inrank_dist.train.monitors import (
    ConsoleMonitor,
    JsonlMonitor,
    Monitors,
    console,
    read_metrics,
)

LAYERS = {"blocks.0.mlp.up": 14, "blocks.0.mlp.down": 16}
START = {
    "kind": "start",
    "time": 1760000000.0,
    "world_size": 2,
    "engine": "fsdp",
    "device": "cuda",
    "model": "gpt2",
    "mode": "efficient",
    "parameters": 124_400_000,
    "steps": 1000,
    "seed": 1234,
    "torch": "2.13.0",
    "unigram_entropy": 6.912,
    "train_tokens": 9_800_000,
    "validation_tokens": 220_000,
    "ranks": dict.fromkeys(LAYERS, 8),
}


def step(number: int, **extra: Any) -> dict[str, Any]:
    record = {"kind": "step", "step": number, "loss": 5.0 - number / 1000, "tokens": number * 2048}
    record |= {"tokens_per_s": 54321.0, "data_wait": 0.0, "lr": 6e-4, "grad_norm": 0.912, "parameters": 91_200_000}
    return record | extra


def grow(number: int, null_rank: float = 31) -> dict[str, Any]:
    layers = {name: {"from": 8, "to": rank, "explained": 0.82, "null_rank": null_rank} for name, rank in LAYERS.items()}
    return {"kind": "rank_event", "step": number, "action": "grow", "seconds": 0.04, "layers": layers}


def check(number: int) -> dict[str, Any]:
    entry = {"rank": 14, "explained": 0.91, "null_rank": 31, "effective_rank": 6.5}
    return {"kind": "rank_check", "step": number, "seconds": 0.02, "layers": dict.fromkeys(LAYERS, entry)}


SUMMARY = {
    "kind": "summary",
    "step": 1000,
    "tokens": 2_048_000,
    "seconds": 751.0,
    "train_loss": 3.412,
    "validation_loss": 3.566,
    "perplexity": math.exp(3.566),
    "unigram_entropy": 6.912,
    "parameters": 91_200_000,
    "parameters_dense": 124_400_000,
    "parameters_start": 126_000_000,
    "ranks": {name: {"rank": rank, "null_rank": 31, "shape": [768, 768]} for name, rank in LAYERS.items()},
    "seed": 1234,
    "world_size": 2,
}


def written(tmp_path: Path, *records: dict[str, Any]) -> Path:
    path = tmp_path / "metrics.jsonl"
    monitor = JsonlMonitor(path)
    for record in records:
        monitor.write(record)
    monitor.close()
    return path


class TestJsonl:
    def test_a_record_is_in_the_file_when_write_returns(self, tmp_path: Path) -> None:
        """A process that dies by SIGKILL flushes nothing later."""
        monitor = JsonlMonitor(tmp_path / "run" / "metrics.jsonl")
        for number in range(1, 4):
            monitor.write(step(number, new_key={"a": [1, None]}))
            records = read_metrics(monitor.path)
            assert [record["step"] for record in records] == list(range(1, number + 1))
        assert records[-1] == step(3, new_key={"a": [1, None]})
        monitor.close()
        monitor.close()

    def test_what_is_not_finite_becomes_null_at_any_depth(self, tmp_path: Path) -> None:
        """Python's json writes NaN, which no other reader of JSON accepts."""
        layers = {"a": {"explained": math.nan, "list": [math.inf, 1.5]}}
        path = written(tmp_path, step(1, loss=math.nan, grad_norm=-math.inf, layers=layers))

        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is not JSON")

        record = json.loads(path.read_text(), parse_constant=refuse)
        assert record["loss"] is None and record["grad_norm"] is None
        assert record["layers"] == {"a": {"explained": None, "list": [None, 1.5]}}

    def test_half_a_line_of_a_killed_run_is_cut_before_appending(self, tmp_path: Path) -> None:
        path = written(tmp_path, step(1), step(2))
        with path.open("ab") as file:
            file.write(b'{"kind":"step","step":3,"lo')
        assert [record["step"] for record in read_metrics(path)] == [1, 2]
        monitor = JsonlMonitor(path)
        monitor.write(step(3))
        monitor.close()
        assert read_metrics(path) == [step(1), step(2), step(3)]

    @settings(max_examples=60, deadline=None)
    @given(cut=st.integers(min_value=0, max_value=10_000), text=st.text(max_size=20))
    def test_cut_anywhere_it_reads_as_a_prefix_and_can_be_continued(
        self, tmp_path_factory: pytest.TempPathFactory, cut: int, text: str
    ) -> None:
        """A write may stop at any byte: what remains is a prefix of the records, and the next fits behind."""
        records = [step(1, note=text), {"kind": "sample", "step": 1, "text": text}, step(2)]
        path = written(tmp_path_factory.mktemp("cut"), *records)
        content = path.read_bytes()
        path.write_bytes(content[: cut % (len(content) + 1)])
        survivors = read_metrics(path)
        assert survivors == records[: len(survivors)]
        assert len(survivors) >= path.read_bytes().count(b"\n")
        monitor = JsonlMonitor(path)
        monitor.write(step(9))
        monitor.close()
        assert read_metrics(path) == [*survivors, step(9)]

    def test_a_run_killed_while_it_writes_can_be_read_and_continued(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        code = (
            "import sys; from pathlib import Path\n"
            "from inrank_dist.train.monitors.jsonl import JsonlMonitor\n"
            "m, n = JsonlMonitor(Path(sys.argv[1])), 0\n"
            "while True:\n n += 1; m.write({'kind': 'step', 'step': n, 'pad': 'x' * 20000})"
        )
        with subprocess.Popen([sys.executable, "-c", code, str(path)]) as process:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and (not path.exists() or path.stat().st_size < 2_000_000):
                time.sleep(0.005)
            process.kill()
        count = len(read_metrics(path))
        assert count >= 99
        monitor = JsonlMonitor(path)
        monitor.write(step(count + 1))
        monitor.close()
        assert [record["step"] for record in read_metrics(path)] == list(range(1, count + 2))

    def test_truncate_makes_the_resumed_curve_single_valued(self, tmp_path: Path) -> None:
        """Resumed at 2, steps 3 and 4 are trained again: their old records must not stay beside the new."""
        path = tmp_path / "metrics.jsonl"
        monitor = JsonlMonitor(path)
        resume = {"kind": "resume", "step": 3, "world_size": 1}
        for record in (START, step(1), step(2), check(2), step(3), resume, grow(4), step(4), {"kind": "new"}):
            monitor.write(record)
        monitor.truncate_after(2)
        monitor.write(step(3, loss=1.0))
        monitor.close()
        assert read_metrics(path) == [
            START,
            step(1),
            step(2),
            check(2),
            resume,
            {"kind": "new"},
            step(3, loss=1.0),
        ]
        assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]

    def test_truncate_drops_a_validation_that_is_done_again(self, tmp_path: Path) -> None:
        """Saved while it was due, validated after the resumption, killed before the next save: it would come twice."""
        path = tmp_path / "metrics.jsonl"
        monitor = JsonlMonitor(path)
        evaluation = {"kind": "eval", "step": 2, "loss": 1.0}
        for record in (step(1), step(2), check(2), evaluation, {"kind": "summary", "step": 2}):
            monitor.write(record)
        monitor.truncate_after(2)
        assert read_metrics(path)[3] == evaluation
        monitor.truncate_after(2, evaluation_due=True)
        monitor.close()
        assert read_metrics(path) == [step(1), step(2), check(2)]

    def test_truncate_replaces_the_file_as_a_whole(self, tmp_path: Path) -> None:
        """A reader that opened the file before keeps reading the old one, not a mixture."""
        path = written(tmp_path, *[step(number) for number in range(1, 50)])
        monitor = JsonlMonitor(path)
        with path.open() as reader:
            reader.readline()
            monitor.truncate_after(10)
            assert len(reader.readlines()) == 48
        assert len(read_metrics(path)) == 10
        monitor.close()

    def test_a_broken_line_before_the_end_is_named(self, tmp_path: Path) -> None:
        path = written(tmp_path, step(1), step(2))
        path.write_bytes(path.read_bytes().replace(b'"step"', b'"st', 1))
        with pytest.raises(UserError, match=r"metrics\.jsonl line 1 is not a JSON object"):
            read_metrics(path)

    def test_a_missing_file_is_the_users_mistake(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="does not exist"):
            read_metrics(tmp_path / "metrics.jsonl")


class Clock:
    """Stands in for the time module, so that the time left can be checked to the second."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def console_lines(*records: dict[str, Any], total: int = 1000) -> list[str]:
    stream = io.StringIO()
    monitor = ConsoleMonitor(total, stream)
    for record in records:
        monitor.write(record)
    monitor.close()
    monitor.close()
    return stream.getvalue().splitlines()


class TestConsole:
    def test_a_step_line_holds_what_a_person_wants(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock()
        monkeypatch.setattr(console, "time", clock)
        stream = io.StringIO()
        monitor = ConsoleMonitor(1000, stream)
        monitor.write(START)
        monitor.write(grow(1))
        monitor.write(step(1))
        clock.now += 18.0
        monitor.write(step(10))
        first, second = stream.getvalue().splitlines()[-2:]
        assert "ETA -" in first
        assert "10/1000   1.0%" in second and "loss 4.9900" in second and "lr 6.00e-04" in second
        assert "grad 0.912" in second and "54,321 tok/s" in second and "rank 15.0 (null 31.0)" in second
        assert second.endswith("ETA 0:33:00"), "990 steps at 2 s"

    def test_waiting_for_data_is_shown_where_it_counts(self) -> None:
        """A run that starves must say so; one that does not must not bore."""
        assert "tok/s  data 3%  ETA" in console_lines(step(1, data_wait=0.031))[0]
        assert "tok/s  data 1%  ETA" in console_lines(step(1, data_wait=0.01))[0]
        for little in (0.0, 0.0099, None):
            assert "data" not in console_lines(step(1, data_wait=little))[0]

    def test_the_step_time_is_smoothed_and_forgotten_on_resume(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One slow step must not make the time left ten times as long; a resume's gap is no step at all."""
        clock = Clock()
        monkeypatch.setattr(console, "time", clock)
        stream = io.StringIO()
        monitor = ConsoleMonitor(1000, stream)
        for number, seconds in ((1, 0.0), (2, 1.0), (3, 11.0)):
            clock.now += seconds
            monitor.write(step(number))
        assert stream.getvalue().endswith("ETA 0:33:14\n"), "997 steps at 0.9 * 1 s + 0.1 * 11 s"
        clock.now += 86_400
        monitor.write({"kind": "resume", "step": 3, "world_size": 4})
        monitor.write(step(4))
        assert "resumed at step 3 on 4 processes" in stream.getvalue()
        assert stream.getvalue().endswith("ETA -\n")

    def test_a_rank_event_is_one_line_with_its_null_rank(self) -> None:
        assert console_lines(grow(100)) == [
            "step 100  grow: mean rank 8.0 -> 15.0 (2 of 2 layers, null rank 31.0, explained 0.82) in 0.04 s"
        ]

    def test_ranks_that_are_the_null_rank_are_called_that(self) -> None:
        """The published ranks were those of untrained factors; nobody should have to find that out again."""
        (line,) = console_lines(grow(100, null_rank=16.2))
        assert line.endswith(
            "in 1 of 2 layers the rank found is the null rank within 2%: "
            "the rule found no more than it finds on untrained factors"
        )
        assert "null rank within" not in console_lines(grow(100, null_rank=16.4))[0]

    def test_no_rank_is_shown_without_its_null_rank(self) -> None:
        lines = console_lines(START, step(1), grow(2), step(2), check(4), step(4), SUMMARY)
        assert not [line for line in lines if "rank" in line.replace("low-rank", "") and "null" not in line]

    def test_the_unigram_entropy_stands_in_the_start_and_the_summary_not_at_every_validation(self) -> None:
        evaluation = {"kind": "eval", "step": 50, "loss": 4.5, "perplexity": 90.017}
        lines = console_lines(START, evaluation, evaluation, SUMMARY)
        assert lines[3:5] == ["step 50  validation loss 4.5000  perplexity 90.02"] * 2
        for told in (lines[:3], lines[5:]):
            assert "\n".join(told).count("unigram entropy 6.9120, perplexity 1,004") == 1

    def test_start_is_short_and_the_summary_says_all(self) -> None:
        start = console_lines(START)
        assert len(start) == 3
        for fact in (
            "gpt2",
            "efficient",
            "seed 1234",
            "2 processes",
            "cuda",
            "fsdp",
            "124.4M",
            "1,000 steps",
            "9.8M",
        ):
            assert fact in "\n".join(start)
        summary = "\n".join(console_lines(START, SUMMARY)[3:])
        for fact in (
            "1,000 steps",
            "0:12:31",
            "3.4120",
            "3.5660",
            "35.37",
            "126.0M -> 91.2M (0.73 of dense, 124.4M)",
        ):
            assert fact in summary

    def test_lines_are_plain_and_unknown_kinds_are_silent(self) -> None:
        assert console_lines({"kind": "weather", "step": 3}, {}) == []
        lines = console_lines(START, step(1, loss=math.nan, extra=1), {"kind": "step", "step": 2}, SUMMARY)
        assert all(line.isascii() and "\x1b" not in line for line in lines)
        assert "loss nan" in lines[3]

    def test_sampled_text_cannot_move_the_cursor(self) -> None:
        (line,) = console_lines({"kind": "sample", "step": 5, "prompt": "It", "text": " was\x1b[2J\r"})
        assert line == "step 5  sample: [It]  was?[2J?"

    def test_a_loss_is_told_with_the_text_that_it_is_of(self) -> None:
        evaluation = {"kind": "eval", "step": 50, "loss": 4.5, "perplexity": 90.017, "held_out_tokens": 32_768}
        lines = console_lines(START, evaluation, SUMMARY)
        assert sum("  on 32,768 held-out tokens" in line for line in lines) == 2
        assert any(line.startswith("  train loss") and line.endswith("on one batch") for line in lines)

    def test_an_empty_prompt_leaves_no_brackets(self) -> None:
        assert console_lines({"kind": "sample", "step": 5, "prompt": "", "text": "was"}) == ["step 5  sample: was"]

    def test_a_model_no_better_than_token_frequencies_is_called_that(self) -> None:
        told = "the model predicts no better than the token frequencies do"
        assert told in "\n".join(console_lines(START, {**SUMMARY, "validation_loss": 6.912}))
        assert told not in "\n".join(console_lines(START, SUMMARY))

    def test_sampled_text_survives_a_stream_that_cannot_encode_it(self) -> None:
        """Batch systems often run with an ASCII locale."""
        raw = io.BytesIO()
        monitor = ConsoleMonitor(10, io.TextIOWrapper(raw, encoding="ascii"))
        monitor.write({"kind": "sample", "step": 5, "prompt": "\u00e9", "text": "\u4e2d"})
        assert raw.getvalue() == b"step 5  sample: [?] ?\n"

    def test_on_a_terminal_a_bar_follows_the_lines(self) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        stream = Terminal()
        monitor = ConsoleMonitor(1000, stream)
        monitor.write(START)
        monitor.write(step(250))
        assert "250/1000" in stream.getvalue() and "250/1,000 steps" in stream.getvalue()
        monitor.write(SUMMARY)
        after = stream.getvalue().partition("done:")[2]
        monitor.close()
        assert "steps \x1b" not in after and "3.5660" in after


class Recorder:
    def __init__(self, fails: bool = False) -> None:
        self.records: list[dict[str, Any]] = []
        self.closed = 0
        self.fails = fails

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed += 1
        if self.fails:
            raise OSError("disk full")


def test_every_monitor_hears_every_record_and_is_closed() -> None:
    """One monitor that cannot close must not keep another's last records from the disk."""
    broken, sound = Recorder(fails=True), Recorder()
    monitors = Monitors([broken, sound])
    monitors.write(step(1))
    (heard,) = broken.records
    assert broken.records == sound.records and abs(heard.pop("time") - time.time()) < 60
    assert heard == {key: value for key, value in step(1).items() if key != "time"}
    with pytest.raises(OSError, match="disk full"):
        monitors.close()
    assert sound.closed == 1


def test_without_monitors_records_go_nowhere() -> None:
    """Every process but the first holds this."""
    monitors = Monitors()
    monitors.write(step(1))
    monitors.close()
