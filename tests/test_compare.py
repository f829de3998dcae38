"""Several runs beside each other: what is grouped and said before comparing, and that the page holds the numbers."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import Fails, small_config
from test_report import records_of_a_run

from inrank_dist.commands.main import main
from inrank_dist.optim.settings import optimizers_of
from inrank_dist.report.compare import terminal_table, write_comparison
from inrank_dist.report.comparison import LONGEST, Comparison, labels, readable
from inrank_dist.report.control import control_sentence, find_control
from inrank_dist.report.run import ON_FACTORS, read_run
from inrank_dist.report.style import with_commands

HOSTILE = ["<script>alert(1)</script>&amp;[red]", "\u202eevil\u202d", "x" * 200, "**a** `b`\n|c|"]


def make_run(folder: Path, seed: int = 0, loss: float = 4.2, steps: int = 120, **settings: Any) -> Path:
    """A finished run of records with FLOPs and seconds, whose losses are ``loss`` at the end."""
    mode = settings.get("lowrank__mode", "efficient")
    records = records_of_a_run(mode, steps=steps)
    for record in records:
        if record["kind"] == "step":
            record |= {"flops": record["step"] * 1e9, "seconds": record["step"] * 0.5, "resident_memory": 2**28}
        elif record["kind"] == "eval":
            record |= {"loss": record["loss"] + loss - 4.2099, "bits_per_byte": 1.5}
        elif record["kind"] == "summary":
            record |= {
                "validation_loss": loss,
                "flops": steps * 1e9,
                "seconds": steps * 0.5,
                "bits_per_byte": 1.5,
                "peak_memory": 2**28,
            }
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = small_config(folder.parent, run__seed=seed, run__name=folder.name, **settings)
    (folder / "config.yaml").write_text(config.to_yaml())
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two seeds each of a dense and a low-rank config."""
    dense = {"lowrank__mode": "full", "optimizer__lr": 0.001}
    return [
        make_run(tmp_path / "dense-0", 0, 4.0, **dense),
        make_run(tmp_path / "dense-1", 1, 4.2, **dense),
        make_run(tmp_path / "inrank-0", 0, 4.3),
        make_run(tmp_path / "inrank-1", 1, 4.5),
    ]


def change(run: Path, kind: str, **entries: Any) -> None:
    """Change the records of a kind."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [record | entries if record["kind"] == kind else record for record in records]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def unfinish(run: Path, step: int) -> None:
    """Cut the records after a step."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line).get("step", 0) <= step]
    (run / "metrics.jsonl").write_text("".join(line for line in kept if '"summary"' not in line))


def test_seeds_of_one_config_are_a_mean_and_a_range(runs: list[Path], tmp_path: Path) -> None:
    comparison = Comparison(runs)
    assert [(group.label, len(group.members)) for group in comparison.groups] == [("dense", 2), ("inrank", 2)]
    dense, inrank = comparison.groups
    assert dense.mean(lambda member: member.loss) == pytest.approx(4.1)
    assert inrank.values(lambda member: member.loss) == [4.3, 4.5]
    assert (inrank.mean(lambda member: member.rank), inrank.mean(lambda member: member.null_rank)) == (16, 31)
    page = write_comparison(comparison, tmp_path / "page.html").read_text()
    assert "4.1000" in page and "4.0000 \u2013 4.2000" in page and "1.5000" in page


def test_what_differs_is_said_and_what_changes_nothing_is_not(runs: list[Path]) -> None:
    found = dict(Comparison(runs).differences)
    assert found == {"lowrank.mode": ["full", "efficient"], "optimizer.lr": ["0.001", "0.003"]}


def test_another_setting_is_another_config(runs: list[Path], tmp_path: Path) -> None:
    other = make_run(tmp_path / "inrank-lr", 0, 4.1, optimizer__lr=0.5)
    logged = make_run(tmp_path / "inrank-2", 2, 4.4, log__interval=3, checkpoint__interval=5)
    groups = Comparison([*runs, other, logged]).groups
    assert [len(group.members) for group in groups] == [2, 3, 1] and groups[2].label == "inrank-lr"


def test_settings_of_another_version_do_not_divide_seeds(runs: list[Path]) -> None:
    config = yaml.safe_load((runs[3] / "config.yaml").read_text())
    config["lowrank"]["invented_later"] = 1
    (runs[3] / "config.yaml").write_text(yaml.safe_dump(config))
    assert len(Comparison(runs).groups) == 2


def test_an_unfinished_run_is_told_and_in_no_mean(runs: list[Path], tmp_path: Path) -> None:
    unfinish(runs[3], 50)
    comparison = Comparison(runs)
    assert comparison.groups[1].values(lambda member: member.loss) == [4.3]
    assert comparison.notes()[0].startswith("Not finished: inrank-1 at step 50 of 120.")
    page = write_comparison(comparison, tmp_path / "page.html").read_text()
    assert "inrank-1, not finished" in page and "not finished, step 50 of 120" in page and "1 of 2" in page


def test_configs_without_a_finished_run_are_compared_as_they_are(runs: list[Path]) -> None:
    for run in runs:
        unfinish(run, 90)
    assert Comparison(runs).groups[0].values(lambda member: member.loss) != []


def test_other_data_is_said(runs: list[Path]) -> None:
    assert not any("data" in note for note in Comparison(runs).notes())
    change(runs[2], "start", data_fingerprint="other")
    comparison = Comparison(runs)
    assert comparison.notes()[0].startswith("inrank-0: other data, tokenizer or block length than the others")
    assert "bits per byte are" in comparison.notes()[0]
    assert len(comparison.groups) == 3, "not a seed of the same config"


def test_other_lengths_and_single_seeds_are_said(runs: list[Path], tmp_path: Path) -> None:
    long = make_run(tmp_path / "long", 0, 3.9, steps=200, lowrank__mode="full")
    notes = Comparison([runs[0], long]).notes()
    assert any("different numbers of tokens" in note for note in notes)
    assert any(note.startswith("One seed each") for note in notes)
    assert not any("overlap" in note for note in Comparison(runs).notes())
    change(runs[2], "summary", validation_loss=4.1)
    assert any("overlap" in note for note in Comparison(runs).notes())


def test_losses_at_equal_cost(runs: list[Path], tmp_path: Path) -> None:
    """The longer run is read off where the shorter one ends, between its evaluations."""
    long = make_run(tmp_path / "long", 0, 3.9, steps=200, lowrank__mode="full")
    comparison = Comparison([runs[0], long])
    assert comparison.budgets == {"tokens": 120 * 2048, "flops": 120e9, "seconds": pytest.approx(60.0)}
    member = comparison.members[1]
    evals = dict(member.history.eval_curve("loss"))
    assert member.loss_at("flops", 120e9) == pytest.approx(evals[120])
    assert evals[80] is not None and evals[120] is not None
    assert member.loss_at("tokens", 100 * 2048) == pytest.approx((evals[80] + evals[120]) / 2)
    assert member.loss_at("flops", 1e9) is None and member.loss_at("flops", 1e15) is None
    page = write_comparison(comparison, tmp_path / "page.html").read_text()
    assert "Validation loss at equal cost" in page


def test_records_of_earlier_versions_and_runs_without_a_config(runs: list[Path], tmp_path: Path) -> None:
    """Without FLOPs, seconds, bits per byte and memory; and a run without rank events."""
    old = tmp_path / "old"
    old.mkdir()
    records = records_of_a_run("fixed")
    (old / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    comparison = Comparison([*runs, old])
    assert [group.label for group in comparison.groups] == ["dense", "inrank", "old"]
    assert "old" in write_comparison(comparison, tmp_path / "page.html").read_text()
    assert comparison.groups[2].mean(lambda member: member.null_rank) is None


def test_the_command(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["compare", *map(str, runs), "--output", str(page)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:4] == ["config", "seeds", "steps", "validation"] and out[-1] == str(page)
    assert out[1].split()[:4] == ["dense", "2", "120", "4.1000"] and out[2].split()[0] == "inrank"
    assert "16.0" in out[2] and "31.0" in out[2]


def test_mistakes_are_one_line(runs: list[Path], tmp_path: Path, fails: Fails) -> None:
    assert "write two run folders or more" in fails("compare", runs[0])
    assert "is the same folder as" in fails("compare", runs[0], runs[1], runs[0].parent / "." / "dense-0")
    (tmp_path / "empty").mkdir()
    assert "empty/metrics.jsonl does not exist" in fails("compare", runs[0], tmp_path / "empty")
    assert "is not a run folder" in fails("compare", runs[0], tmp_path / "nothing")
    assert "which is a folder" in fails("compare", *runs, "--output", tmp_path / "empty")
    assert "cannot be written" in fails("compare", *runs, "--output", tmp_path / "no" / "where.html")
    assert not (tmp_path / "compare.html").exists()


# Names


def test_names_tell_folders_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]
    assert labels(folders[:1] + folders[2:]) == ["run", "c"]
    assert labels(folders) == ["a/run", "b/run", f"{tmp_path.name}/c"]
    long = [tmp_path / f"{'x' * 60}{middle}{'y' * 60}" for middle in "ab"]
    assert len({*labels(long)}) == 2 and all(len(each) <= LONGEST for each in labels(long))


def test_a_readable_name_is_one_short_printable_line() -> None:
    assert readable("a\nb\u202ec\x1b[31m") == "a\ufffdb\ufffdc\ufffd[31m"
    assert len(readable("x" * 10_000)) == LONGEST


def test_hostile_names_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for index, name in enumerate(HOSTILE):
        folder = make_run(tmp_path / f"plain-{index}", index, run__deterministic=index % 2 == 1)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["run"]["name"] = config["data"]["document_separator"] = name * (10_000 // len(name))
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        folders.append(folder.rename(tmp_path / name.replace("/", "_")))
    assert main(["compare", *map(str, folders), "--output", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    assert "\u202e" not in out and "\x1b" not in out and "[red]" in out
    page = (tmp_path / "page.html").read_text()
    assert page.count("<script") == 2 and "<script>alert" not in page
    assert "\u202e" not in page.replace("&#8238;", "") and "x" * 100 not in page


# Controls


def test_a_low_rank_run_is_offered_its_control(runs: list[Path], tmp_path: Path) -> None:
    control = find_control(read_run(runs[3]))
    assert control is not None and control.folder.name == "dense-1", "the same seed"
    assert control_sentence(read_run(runs[3])) == (
        f"A control beside it is dense-1 (full rank, validation loss 4.200, the same seed): "
        f"`inrank compare {runs[3]} {runs[1]}`."
    )
    assert control_sentence(read_run(runs[0])) == "", "a full-rank run is one"
    unfinish(runs[1], 50)
    assert "dense-1" in control_sentence(read_run(runs[3])) and "not finished" in control_sentence(read_run(runs[3]))


def test_times_of_other_numbers_of_processes_are_called_not_comparable(runs: list[Path]) -> None:
    assert not any("times" in note for note in Comparison(runs).notes())
    file = runs[0] / "metrics.jsonl"
    file.write_text(file.read_text().replace('"world_size": 4', '"world_size": 8'))
    comparison = Comparison(runs)
    assert any("differ in number of processes, so their times" in note for note in comparison.notes())


def test_commands_of_a_sentence_are_code_that_wraps_between_words() -> None:
    assert with_commands("Run `a <b>`.") == "Run <code><span>a</span> <span>&lt;b&gt;</span></code>."
    assert with_commands("a` & b") == "a` &amp; b"


def test_the_optimizers_of_factors_are_all_known_to_reports() -> None:
    assert {*ON_FACTORS} == {*optimizers_of("factors")}


def test_a_run_of_another_model_or_length_is_no_control(runs: list[Path], tmp_path: Path) -> None:
    for run in runs[:2]:
        shutil.rmtree(run)
    make_run(tmp_path / "wide", lowrank__mode="full", model__hidden_size=128)
    make_run(tmp_path / "long", lowrank__mode="full", train__steps=77)
    (tmp_path / "no run").mkdir()
    assert find_control(read_run(runs[2])) is None


def test_without_a_control_the_report_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command is one that works."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("text")
    folder = make_run(tmp_path / "a run's", optimizer__name="lora_muon")
    sentence = control_sentence(read_run(folder))
    found = re.search(r"This trains one: `launch/torchrun.sh -n 2 (train .*)`; then `(inrank compare .*)`\.$", sentence)
    assert found
    words = shlex.split(found[1])
    assert main([*words, "--dry-run"]) == 0
    assert "'" in found[2] and shlex.split(found[2])[2:] == [str(folder), f"{folder}-dense"]
    assert os.fspath(tmp_path / "a run's-dense") in words


def test_the_report_has_the_sentence(runs: list[Path]) -> None:
    assert main(["report", "--run", str(runs[2])]) == 0
    assert "A control beside it is dense-0" in (runs[2] / "report.html").read_text()


def test_the_terminal_table_has_ranks_beside_null_ranks(runs: list[Path]) -> None:
    headings = [str(column.header) for column in terminal_table(Comparison(runs)).columns]
    assert headings.index("null rank") == headings.index("rank") + 1
