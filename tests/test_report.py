"""The HTML report: whole, self-contained, true to the records, and possible for every run that has any."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inrank_dist.report import write_report
from inrank_dist.report.plot import linear_ticks, log_ticks, smoothed, thinned, tick_labels
from inrank_dist.runtime.errors import UserError

NAMES = [f"blocks.{block}.{kind}" for block in range(2) for kind in ("attn.q", "mlp.up")]
CONFIG = "run:\n  name: first run\nlowrank:\n  mode: efficient\n  threshold: 0.9\n"
ENTROPY = 6.912


def records_of_a_run(mode: str = "efficient", null_rank: int = 31, steps: int = 120) -> list[dict[str, Any]]:
    """A finished run with growth at 20, a freeze and base removal at 40, a resume at 60."""
    names = [] if mode == "full" else NAMES
    ranks = dict.fromkeys(names, 8)
    start = {"kind": "start", "time": 1760000000.0, "world_size": 2, "engine": "fsdp", "device": "cuda"}
    start |= {"model": "gpt2", "mode": mode, "parameters": 126_000_000, "steps": steps, "seed": 7}
    start |= {"torch": "2.13.0", "unigram_entropy": ENTROPY, "train_tokens": 1_000_000, "ranks": ranks}
    records = [start]
    for number in range(1, steps + 1):
        if number == 61:
            records.append({"kind": "resume", "step": 60, "world_size": 4})
        if names and mode != "fixed" and number in (20, 40):
            entry = {"rank": 16, "explained": 0.82, "null_rank": null_rank, "effective_rank": 6.5}
            records.append(
                {"kind": "rank_check", "step": number, "seconds": 0.5, "layers": dict.fromkeys(names, entry)}
            )
            entry = {"from": 8, "to": 16, "explained": 0.82, "null_rank": null_rank}
            action = "grow" if number == 20 else "freeze"
            event = {"kind": "rank_event", "step": number, "action": action, "seconds": 0.5}
            records.append(event | {"layers": dict.fromkeys(names, entry)})
        if number == 40:
            records.append({"kind": "base_removed", "step": 40})
        loss = 4 + 6 * math.exp(-number / 30)
        record = {"kind": "step", "step": number, "loss": loss, "tokens": number * 2048, "lr": 6e-4}
        record |= {"tokens_per_s": 54321.0, "grad_norm": 1 / number, "parameters": 91_200_000, "mfu": 0.3}
        records.append(record)
        if number % 40 == 0:
            records.append({"kind": "eval", "step": number, "loss": loss + 0.1, "perplexity": math.exp(loss + 0.1)})
    records.append({"kind": "sample", "step": steps, "prompt": "It was", "text": " the <b>best</b> & worst"})
    summary = {"kind": "summary", "step": steps, "tokens": steps * 2048, "seconds": 751.0, "train_loss": 4.11}
    summary |= {"validation_loss": 4.2099, "perplexity": 67.35, "unigram_entropy": ENTROPY, "seed": 7}
    summary |= {"parameters": 91_200_000, "parameters_dense": 124_400_000, "parameters_start": 126_000_000}
    null = None if mode == "fixed" else null_rank
    summary["ranks"] = {name: {"rank": 16, "null_rank": null, "shape": [3072, 768]} for name in names}
    return [*records, summary]


def run_folder(folder: Path, records: list[dict[str, Any]], config: str | None = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


class Balance(HTMLParser):
    """Notes every tag that is not closed in order, and the text outside style and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append("program" if tag == "script" and not attrs else tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop().replace("program", "script") != tag:
            self.faults.append(f"{tag} at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if not {"style", "program"} & {*self.open}:
            self.text += data + " "


def text_of(page: str) -> str:
    """The page's text; fails if a tag is not closed."""
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert not parser.faults and not parser.open
    return " ".join(parser.text.split())


def report_text(folder: Path, records: list[dict[str, Any]], config: str | None = CONFIG) -> str:
    return text_of(write_report(run_folder(folder / "run", records, config)).read_text())


def test_the_report_holds_the_numbers(tmp_path: Path) -> None:
    text = report_text(tmp_path, records_of_a_run())
    facts = ["first run", "finished", "gpt2", "seed 7", "2 processes", "torch 2.13.0", "2025-10-09 08:53 UTC"]
    facts += ["4.210", "67.35", "unigram entropy 6.912; 2.702 below it", "unigram 1,004", "0:12:31", "54,321"]
    facts += ["91.2M", "from 126.0M at the start; 0.73 of dense, 124.4M", "null rank 31.0; 4 layers"]
    facts += ["blocks.1.mlp.up", "3,072 \u00d7 768", "61,440", "0.820", "8.0 \u2192 16.0", "threshold 0.9"]
    facts += ["growth", "freeze", "base removed", "resume", "on 4 processes", "mode: efficient"]
    facts += ["1.00 s in all"]
    assert [fact for fact in facts if fact not in text] == []


def test_the_report_needs_nothing_from_outside(tmp_path: Path) -> None:
    """It is opened from a cluster's file system, from a mail, years later."""
    page = write_report(run_folder(tmp_path / "run", records_of_a_run())).read_text()
    assert not re.search(r"https?:|<script [^>]*src|fetch\(|import\(|XMLHttp|<link|<img|@import|src=|url\((?!#)", page)
    assert "prefers-color-scheme" in page and "@media print" in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "a clip path used twice would cut the wrong plot"


def test_everything_from_the_run_is_escaped(tmp_path: Path) -> None:
    """A sample may hold any text at all, and a name may hold a tag."""
    records = records_of_a_run()
    evil = '<script>alert("x")</script>'
    records[0] |= {"model": evil, "device": evil}
    for record in records:
        if record["kind"] in ("rank_event", "rank_check"):
            record["layers"] = {f"{evil}{name}": layer for name, layer in record["layers"].items()}
        if record["kind"] == "rank_event":
            record["action"] = evil
        if record["kind"] == "sample":
            record["prompt"] = evil
    folder = run_folder(tmp_path / "run", records, CONFIG.replace("first run", f"'{evil}'"))
    page = write_report(folder).read_text()
    assert "<script>alert" not in page and "alert(&quot;x&quot;)" in page
    assert "the <b>best</b> & worst" in text_of(page)


@pytest.mark.parametrize(
    ("null_rank", "counts", "sentence"),
    [
        (31, "In 0 of 4 layers the rank found is the null rank within 2%, in 4 it is below", "Below the null rank,"),
        (16, "In 4 of 4 layers the rank found is the null rank within 2%", "the rule has not seen learning."),
        (12, "In 0 of 4 layers the rank found is the null rank within 2%, in 4 it is above", "Above the null rank,"),
    ],
)
def test_the_reading_holds_ranks_found_against_null_ranks(
    tmp_path: Path, null_rank: int, counts: str, sentence: str
) -> None:
    """The rank that the freeze kept, 8, is not what the rule found."""
    records = records_of_a_run(null_rank=null_rank)
    for record in records:
        if record.get("action") == "freeze":
            record["layers"] = {name: entry | {"to": 8, "found": 16} for name, entry in record["layers"].items()}
        if record["kind"] == "summary":
            record["ranks"] = {name: entry | {"rank": 8, "found": 16} for name, entry in record["ranks"].items()}
    text = report_text(tmp_path, records)
    assert f"{counts} (mean rank found 16.0, mean null rank {null_rank}.0)." in text
    assert sentence in text
    assert f"found by the rule 16.0, null rank {null_rank}.0" in text and "Found" in text
    assert ("= null" in text) == (null_rank == 16)


@pytest.mark.parametrize("optimizer", ["spectron", "lora_muon"])
def test_ranks_of_orthogonalised_updates_are_no_finding(tmp_path: Path, optimizer: str) -> None:
    text = report_text(tmp_path, records_of_a_run(), f"{CONFIG}optimizer:\n  name: {optimizer}\n")
    assert "the explained ratio measures the optimizer" in text and "Below the null rank" not in text


def test_ranks_of_a_model_that_learned_nothing_are_no_finding(tmp_path: Path) -> None:
    records = records_of_a_run()
    records[-1] |= {"validation_loss": ENTROPY}
    text = report_text(tmp_path, records)
    assert "its ranks show no learning" in text and "Below the null rank" not in text


def test_the_reading_says_what_one_run_cannot_show(tmp_path: Path) -> None:
    text = report_text(tmp_path, records_of_a_run())
    assert "One seed (7): a difference from another run may be chance" in text
    assert "4.210 nats per token, 2.702 below the unigram entropy, 6.912" in text
    assert "27% fewer than the dense one" in text
    assert "resumed once (at step 60), and the number of processes changed" in text


def test_the_reading_names_bad_news(tmp_path: Path) -> None:
    """No better than token frequencies, worse than before, losses that are no numbers, nothing saved."""
    records = records_of_a_run()
    records[-1] |= {"validation_loss": 7.5, "parameters": 130_000_000}
    records[5]["loss"] = None
    records.insert(-1, {"kind": "eval", "step": 120, "loss": 7.5, "perplexity": math.exp(7.5)})
    text = report_text(tmp_path, records)
    assert "is not below the unigram entropy, 6.912: the model predicts no better than" in text
    assert "above it (over-fitting, or a run that became unstable)" in text
    assert "In 1 of 120 logged steps the loss is not a finite number" in text
    assert "nothing was saved" in text


@pytest.mark.parametrize("mode", ["full", "fixed", "inrank"])
def test_every_mode_has_a_report(tmp_path: Path, mode: str) -> None:
    text = report_text(tmp_path, records_of_a_run(mode))
    assert ("Full rank: no layer is factored" in text) == (mode == "full")
    assert ("No null rank was recorded (the rank was set, not found)" in text) == (mode == "fixed")
    assert ("no null rank measured" in text) == (mode == "fixed")
    assert ("Effective rank" in text and "Rank of every layer" in text) == (mode != "full")


@pytest.mark.parametrize("count", [1, 2, 12, 30, 60, 150])
def test_a_killed_run_has_a_report(tmp_path: Path, count: int) -> None:
    """Cut before the first step, check or evaluation, or later, and always within a line."""
    records = [record for record in records_of_a_run() if record["kind"] != "summary"][:count]
    folder = run_folder(tmp_path / "run", records)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"st')
    text = text_of(write_report(folder).read_text())
    last = max((record["step"] for record in records if record["kind"] == "step"), default=0)
    assert f"not finished: the records end at step {last} of 120, without a summary" in text


def test_a_summary_before_further_steps_is_not_the_end(tmp_path: Path) -> None:
    """A finished run that is continued for more steps and killed must not show the old result as its own."""
    records = records_of_a_run()
    text = report_text(tmp_path, [*records, records[-4] | {"step": 130}])
    assert "not finished" in text and "0:12:31" not in text


def test_records_without_a_start_or_with_unknown_parts_are_drawn(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"kind": "step", "step": 1, "loss": 5.0},
        {"kind": "new"},
        {"kind": "eval", "step": 1},
        {},
    ]
    assert "no validation in these records" in report_text(tmp_path, records, config=None)


@pytest.mark.parametrize("config", [None, "", "a: [1", "- 1", "run: 3\nlowrank: null\n"])
def test_a_config_that_says_nothing_is_no_obstacle(tmp_path: Path, config: str | None) -> None:
    assert "67.35" in report_text(tmp_path, records_of_a_run(), config)


def test_the_same_records_give_the_same_file_and_nothing_else(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", records_of_a_run())
    first = write_report(folder)
    assert first == folder / "report.html"
    content = first.read_bytes()
    assert write_report(folder).read_bytes() == content
    assert sorted(file.name for file in folder.iterdir()) == ["config.yaml", "metrics.jsonl", "report.html"]


def test_half_a_character_pair_in_a_sample_is_no_obstacle(tmp_path: Path) -> None:
    """A byte-level tokenizer can decode to a lone surrogate, which UTF-8 cannot hold."""
    records = [*records_of_a_run(), {"kind": "sample", "step": 120, "prompt": "a", "text": "\ud83d end"}]
    assert "? end" in report_text(tmp_path, records)


def test_a_folder_without_records_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a run folder; write"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist; write"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="holds no records"):
        write_report(run_folder(tmp_path / "empty", []))
    assert not (tmp_path / "empty" / "report.html").exists()


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e7), count=st.integers(3, 10))
def test_linear_ticks_hold_the_data_and_are_told_apart(low: float, span: float, count: int) -> None:
    ticks = linear_ticks(low, low + span, count)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step and ticks[-1] >= low + span - 1e-6 * step
    assert len(ticks) <= count + 2


@given(low=st.floats(1e-8, 1e4), factor=st.floats(1.001, 1e8))
def test_log_ticks_hold_the_data(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert ticks[0] <= low * 1.000001 and ticks[-1] >= low * factor * 0.999999
    assert 2 <= len(ticks) <= 12


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0.0, 2e-4, 4e-4], ["0", "2\u00d710\u207b\u2074", "4\u00d710\u207b\u2074"]),
        ([0.0, 0.5, 1.0], ["0.0", "0.5", "1.0"]),
        ([0.0, 250.0, 1000.0], ["0", "250", "1,000"]),
        ([0.0, 50_000.0], ["0", "50k"]),
        ([0.0, 20e6, 40e6], ["0", "20M", "40M"]),
    ],
)
def test_one_axis_one_notation(ticks: list[float], labels: list[str]) -> None:
    assert tick_labels(ticks) == labels


def test_thinning_keeps_every_spike() -> None:
    """A loss spike of one step in ten thousand is what one looks for."""
    points: list[tuple[float, float | None]] = [(float(x), 1.0) for x in range(10_000)]
    points[4321] = (4321.0, 50.0)
    points[777] = (777.0, None)
    kept = thinned(points)
    assert len(kept) <= 510 and (4321.0, 50.0) in kept


def test_smoothing_does_not_lag() -> None:
    """A lagging mean of a falling training loss would lie above the validation loss for no reason."""
    line: list[tuple[float, float | None]] = [(float(x), 10.0 - 0.1 * x) for x in range(100)]
    assert [y for _, y in smoothed(line, 9)] == pytest.approx([y for _, y in line])
    assert smoothed([(0.0, 1.0), (1.0, None), (2.0, 3.0)], 1) == [(0.0, 1.0), (1.0, None), (2.0, 3.0)]
