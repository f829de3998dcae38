"""A study: real runs, each once, compared by seed; what is refused; several workers; a stop in the middle."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_tools import ROOT, wait_until
from runs import SHORT, Fails, small_config
from study_runs import pretend

from inrank_dist.commands.main import main
from inrank_dist.runtime.errors import UserError
from inrank_dist.runtime.stop import Stopped
from inrank_dist.study import Worker, read_study
from inrank_dist.study.page import notes, write_results
from inrank_dist.study.results import T_95, compare, difference
from inrank_dist.study.settings import Variant
from inrank_dist.study.work import Outcome, Run
from inrank_dist.train.monitors.text import operations

VARIANTS: dict[str, Any] = {
    "dense": {"settings": {"lowrank.mode": "full"}},
    "inrank": {"control": "dense", "tune": {"optimizer.lr": ["1e-3", "3e-3"]}},
}
BUDGET = {"tokens": 1536, "flops": "control"}
"""Twelve steps of eight rows of 16 tokens."""


def study_file(folder: Path, corpus: Path, **changes: Any) -> Path:
    """A study of ``SHORT`` runs below ``folder``."""
    config = small_config(corpus, base=SHORT, eval__interval=6, eval__batches=2, run__dir=folder / "unused")
    (folder / "base.yaml").write_text(config.to_yaml())
    study: dict[str, Any] = {
        "base": "base.yaml", "dir": str(folder / "study"), "seeds": [0, 1], "tuning_seeds": [7], "budget": BUDGET,
        "variants": VARIANTS,
    }  # fmt: skip
    file = folder / "my.yaml"
    file.write_text(yaml.safe_dump(study | changes, sort_keys=False))
    return file


def command(file: Path) -> list[str]:
    return [sys.executable, "-m", "inrank_dist", "study", str(file)]


def stopped(worker: Worker) -> None:
    raise Stopped("stopped; the same command goes on from there")


@pytest.fixture(scope="module")
def done(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A study that two workers have done together, and what both said."""
    folder = tmp_path_factory.mktemp("study")
    file = study_file(folder, corpus)
    done = subprocess.run([*command(file), "--workers", "2"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return file, done.stderr


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_each_run_is_done_once_and_compared_by_seed(done: tuple[Path, str]) -> None:
    file, said = done
    folder = file.parent / "study"
    runs = sorted(path.name for path in (folder / "runs").iterdir() if not path.name.startswith("."))
    # Two seeds of the control; two rates; two seeds with equal tokens and two with equal FLOPs.
    assert len(runs) == 8
    started = re.findall(r"^(.*) \.\.\.$", said, re.MULTILINE)
    assert len([line for line in started if ", seed " in line]) == 8 == len({*started})
    tables = json.loads((folder / "study.json").read_text())
    assert list(tables) == ["tokens", "flops", "notes"] and tables["notes"][0].startswith("Mean over 2 seeds")
    (dense, inrank), (dense_again, longer) = tables["tokens"], tables["flops"]
    assert dense == dense_again
    assert dense["control"] is None and dense["rank"] is None and inrank["control"] == "dense"
    assert dense["steps"] == inrank["steps"] == 12
    assert inrank["rank"] > 0 and inrank["null_rank"] > 0
    for losses, control, row in (
        (inrank["losses"], dense["losses"], inrank),
        (longer["losses"], dense["losses"], longer),
    ):
        assert row["differences"] == pytest.approx([a - b for a, b in zip(losses, control, strict=True)])
    assert longer["steps"] == round(12 * dense["flops"] / inrank["flops"])
    assert longer["flops"] == pytest.approx(dense["flops"], rel=1 / 12)
    assert inrank["peak_memory"] > 2**26
    # The best rate, by the seed that is compared by nobody.
    worker = Worker(study := read_study(file))
    tuning = {run.point: worker.outcome(run) for run in worker.tuning(study.variants["inrank"])}
    best = min(tuning, key=lambda point: tuning[point].loss)  # type: ignore[union-attr]
    assert inrank["chosen"] == dict(best)
    page = (folder / "study.html").read_text()
    for text in ("Equal tokens", "Equal FLOPs", "dense", "inrank", "Student", "tuning_seeds"):
        assert text in page
    assert "Not all variants were tuned equally; points of the grids: dense 1, inrank 2." in page


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_what_is_there_is_not_done_again(
    done: tuple[Path, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = done
    folder = file.parent / "study"
    before = (folder / "study.json").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/metrics.jsonl")}
    assert main(["study", str(file)]) == 0
    assert "seed" not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert (folder / "study.json").read_text() == before
    gone = sorted(stamps)[0]
    shutil.rmtree(gone.parent)
    assert main(["study", str(file), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("to do  ") == 1
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "work", stopped)
        assert main(["study", str(file)]) == 75
    assert re.search(r"left out, as not all runs are done or one diverged: (dense|inrank)", capsys.readouterr().out)
    assert "not all runs are done" in (folder / "study.html").read_text()
    assert main(["study", str(file)]) == 0
    assert "not all runs are done" not in (folder / "study.html").read_text()
    assert [path for path in stamps if path.stat().st_mtime_ns != stamps[path]] == [gone]


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_a_stopped_study_goes_on(corpus: Path, tmp_path: Path) -> None:
    """The run at work saves; the same command goes on from there."""
    variants = {"a": {"settings": {"train.micro_batch_size": 4}}, "b": {"control": "a"}}
    budget = {"tokens": 128 * 400}
    file = study_file(tmp_path, corpus, variants=variants, budget=budget, seeds=[0])
    (tmp_path / "out").touch()
    with (tmp_path / "out").open("w") as output:
        worker = subprocess.Popen(command(file), stdout=output, stderr=output)
        wait_until(
            lambda: any('"step": 9' in path.read_text() for path in tmp_path.glob("study/runs/*/metrics.jsonl")), 100
        )
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(100) == 75
    assert "the same command goes on from there" in (tmp_path / "out").read_text()
    (run,) = tmp_path.glob("study/runs/seed-*")
    assert list(run.glob("checkpoints/step-*"))
    file = study_file(tmp_path, corpus, variants=variants, budget=budget, seeds=[0])
    done = subprocess.run(command(file), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("resume") == 1 and kinds.count("summary") == 1
    tables = json.loads((tmp_path / "study/study.json").read_text())
    flops = [row["flops"] for row in tables["tokens"]]
    assert flops[0] == flops[1]  # the run that was stopped has counted all of its steps
    assert tables["tokens"][1]["verdict"] == "one seed: no interval"


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_rate_at_which_training_diverges_is_not_chosen(corpus: Path, tmp_path: Path) -> None:
    grid = {"optimizer.lr": ["1e30", "1e-3"], "optimizer.name": ["sgd"]}
    variants = {"a": {"tune": grid}, "b": {"control": "a", "settings": {"lowrank.mode": "full"}}}
    file = study_file(tmp_path, corpus, variants=variants, budget={"tokens": 1536}, seeds=[0])
    done = subprocess.run(command(file), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "it diverged" in done.stderr
    assert json.loads((tmp_path / "study/study.json").read_text())["tokens"][0]["chosen"]["optimizer.lr"] == "0.001"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"variants": {"a": {}}}, "variant 'a' has no control; write control: with the name of the variant"),
        ({"variants": {"a": {}, "b": {"control": "c"}}}, "variant 'a' has no control"),
        (
            {"variants": {"a": {}, "b": {"control": "a"}, "c": {"control": "d"}}},
            "control of 'c' is 'd'; write one of a, b",
        ),
        ({"variants": {"a": {"control": "a"}}}, "the control of 'a' is 'a'; write one of"),
        ({"variants": []}, "variants is []; write names with settings below each"),
        ({"variants": {"a": {"contrl": "b"}}}, "unknown 'contrl'; did you mean 'control'?"),
        ({"budjet": {}}, "unknown 'budjet'; did you mean 'budget'?"),
        ({"budget": {"tokens": "control"}}, "budget.tokens is control; write a positive number"),
        ({"budget": {"flops": -1}}, "budget.flops is -1; write a positive number, or control"),
        ({"budget": {"hours": 1}}, "unknown 'hours'; known are tokens, flops, seconds"),
        ({"seeds": [0, 7]}, "seed 7 is in seeds and in tuning_seeds"),
        ({"seeds": []}, "seeds is []; write a list of whole numbers"),
        ({"seeds": [0, 0]}, "write each seed once"),
        ({"processes": 0}, "processes is 0; write a whole number of at least 1"),
        ({"settings": {"train.steps": 5}}, "train.steps is given by the study; write budget"),
        ({"settings": {"optimizer.lrr": 5}}, "unknown 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ({"settings": {"lowrank": {"mode": "fast"}}}, "variant 'inrank' of {file}: lowrank.mode is fast; write one of"),
        ({"base": "none.yaml"}, "none.yaml cannot be read"),
        ({"variants": {"a": {}, "b": {"control": "a", "budget": "tokens"}}}, "budget is tokens; write a list of units"),
        (
            {"variants": {"a": {}, "b": {"control": "a", "budget": ["seconds"]}}},
            "budget holds seconds; write some of tokens, flops, as in the study's budget",
        ),
        ({"variants": {"a": {"control": "b"}, "b": {"control": "a"}}}, "the controls of a, b form a circle; leave"),
        ({"settings": {"eval.interval": 0}}, "eval.interval is 0, and validation losses are what is compared; write"),
        (
            {"variants": {"a": {"seconds_per_step": 0}, "b": {"control": "a"}}},
            "seconds_per_step is 0; write a positive",
        ),
        (
            {"variants": {"a": {"budget": []}, "b": {"control": "a"}}},
            "'b' is compared at equal flops but its control 'a' is not; write flops in the budget of 'a' too",
        ),
    ],
)
def test_mistakes(corpus: Path, tmp_path: Path, fails: Fails, changes: dict[str, Any], says: str) -> None:
    """One line, before anything is run."""
    file = study_file(tmp_path, corpus, **changes)
    assert says.replace("{file}", str(file)) in fails("study", file)
    assert not (tmp_path / "study").exists()


def test_a_setting_that_is_tuned_is_not_set_as_well(corpus: Path, tmp_path: Path, fails: Fails) -> None:
    both = {"settings": {"optimizer.lr": 1}, "tune": {"optimizer.lr": [1, 2]}, "control": "dense"}
    error = fails("study", study_file(tmp_path, corpus, variants=VARIANTS | {"c": both}))
    assert "optimizer.lr is in settings and in tune" in error


def test_the_interval_of_paired_differences() -> None:
    """By hand: differences 1, 2, 3 have mean 2 and standard deviation 1."""
    found = difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (found.mean, found.half) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert found.verdict == "within the noise"
    assert difference([1.0, 1.1, 1.05], [2.0, 2.1, 2.06]).verdict == "below its control"
    assert difference([2.0, 2.1, 2.06], [1.0, 1.1, 1.05]).verdict == "above its control"
    assert difference([1.0], [2.0]).verdict == "one seed: no interval"
    assert difference([math.inf, 1.0], [2.0, 2.0]).verdict == "a run diverged"


def test_the_quantiles_are_students() -> None:
    """Of samples of a normal distribution, the interval misses the mean one time in twenty."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for count in (2, 3, 6):
        draws = torch.randn(40_000, count, generator=generator, dtype=torch.float64)
        half = T_95[count - 2] * draws.std(1) / math.sqrt(count)
        assert float((draws.mean(1).abs() > half).double().mean()) == pytest.approx(0.05, abs=0.005)


def test_a_grid_that_another_worker_ends_meanwhile(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last run is seen to be done after the runs were named: then the runs of its best point are still to do."""
    study = read_study(study_file(tmp_path, corpus))
    worker, tuned = Worker(study), Worker(study).tuning(study.variants["inrank"])
    named, summary = worker.runs, {"validation_loss": 1.0, "flops": 1.0, "tokens": 1536}

    def runs() -> list[Run]:
        found = named()
        for run in (*tuned, *(each for each in found if each.variant.name == "dense")):
            worker._outcomes.setdefault(run, Outcome(summary))
        return found

    monkeypatch.setattr(worker, "runs", runs)
    assert [run.seed for run in worker.pending()] == [0, 1]


def test_a_variant_that_is_compared_at_equal_tokens_only(corpus: Path, tmp_path: Path) -> None:
    variants = VARIANTS | {"cheap": {"control": "dense", "budget": ["tokens"], "settings": {"lowrank.initial_rank": 1}}}
    study = read_study(study_file(tmp_path, corpus, variants=variants))
    worker = Worker(study)
    for _ in range(3):  # the grid, its best point, its runs with equal FLOPs
        for run in worker.pending():
            flops = 1e6 if run.variant.name == "dense" else 5e5
            worker._outcomes[run] = Outcome({"validation_loss": 1.0, "flops": flops, "ranks": {}})
    assert not worker.pending()
    assert {run.steps for run in worker.runs() if run.variant.name == "cheap"} == {12}
    assert {run.steps for run in worker.runs() if run.variant.name == "inrank"} == {12, 24}
    rows = {unit: [row.variant.name for row in table] for unit, table in compare(worker).tables.items()}
    assert rows == {"tokens": ["dense", "inrank", "cheap"], "flops": ["dense", "inrank"]}


CHAIN: dict[str, Any] = {
    "dense": {"settings": {"lowrank.mode": "full"}},
    "large": {"control": "dense", "settings": {"lowrank.initial_rank": 3}},
    "small": {"control": "large", "settings": {"lowrank.initial_rank": 1}},
}
COSTS = {"dense": 1.0, "large": 0.66, "small": 0.5}


def cost(run: Run) -> float:
    return COSTS[run.variant.name]


def test_all_of_a_chain_of_controls_have_the_budget_of_its_end(corpus: Path, tmp_path: Path) -> None:
    study = read_study(study_file(tmp_path, corpus, variants=CHAIN, budget=BUDGET | {"seconds": "control"}))
    worker = Worker(study)
    pretend(worker, cost, lambda run: 3.0)
    rows = {unit: {row.variant.name: row for row in table} for unit, table in compare(worker).tables.items()}
    for unit in ("flops", "seconds"):
        assert {name: row.steps for name, row in rows[unit].items()} == {"dense": 12, "large": 18, "small": 24}
    assert {name: row.parameters / row.parameters_root for name, row in rows["tokens"].items()} == COSTS


def test_the_time_of_a_step_that_was_measured_elsewhere(corpus: Path, tmp_path: Path) -> None:
    timed = {name: content | {"seconds_per_step": COSTS[name] ** 2} for name, content in CHAIN.items()}
    file = study_file(tmp_path, corpus, variants=timed, budget={"tokens": 1536, "seconds": "control"})
    worker = Worker(read_study(file))
    pretend(worker, cost, lambda run: 3.0)
    rows = {row.variant.name: row.steps for row in compare(worker).tables["seconds"]}
    assert rows == {"dense": 12, "large": round(12 / 0.66**2), "small": 48}
    assert compare(worker).step_times == {}


def test_times_of_runs_that_differ_are_told(corpus: Path, tmp_path: Path) -> None:
    study = read_study(study_file(tmp_path, corpus, variants=CHAIN, budget={"tokens": 1536, "seconds": "control"}))
    worker = Worker(study)
    pretend(worker, lambda run: cost(run) * (1.3 if run.seed and run.variant.name == "large" else 1), lambda run: 3.0)
    comparison = compare(worker)
    assert comparison.step_times == {"dense": 0.0, "large": pytest.approx(0.3), "small": 0.0}
    (sentence,) = [each for each in notes(study, comparison) if each.startswith("Steps of")]
    assert sentence.startswith("Steps of large took up to 30% longer in one run than in another")


def test_who_diverges_has_a_row_and_the_others_theirs(corpus: Path, tmp_path: Path) -> None:
    """A variant without a grid, one seed of another, and a whole grid."""
    grid = {"control": "dense", "settings": {"lowrank.mode": "fixed"}, "tune": {"optimizer.lr": ["1e-3", "2e-3"]}}
    study = read_study(study_file(tmp_path, corpus, variants=CHAIN | {"tuned": grid}))
    worker, diverging = Worker(study), {"small", "tuned"}

    def loss(run: Run) -> float | None:
        return None if run.variant.name in diverging or (run.variant.name == "large" and run.seed) else 3.0

    pretend(worker, cost, loss)
    comparison = compare(worker)
    words = {row.variant.name: row.difference and row.difference.verdict for row in comparison.tables["tokens"]}
    assert words == {"dense": None} | dict.fromkeys(("large", "small", "tuned"), "a run diverged")
    assert [row.variant.name for row in comparison.tables["flops"]] == ["dense"]
    assert "Equal FLOPs: left out, as not all runs are done or one diverged: large; small; tuned." in notes(
        study, comparison
    )
    write_results(study, comparison)


def test_runs_on_other_data_or_machines_are_told(corpus: Path, tmp_path: Path) -> None:
    study = read_study(study_file(tmp_path, corpus, variants=CHAIN))
    pretend(Worker(study), cost, lambda run: 3.0)
    changed = next(run for run in Worker(study).runs() if run.variant.name == "large")
    file = changed.folder / "metrics.jsonl"
    file.write_text(file.read_text().replace('"data_fingerprint": "a"', '"data_fingerprint": "b"'))
    comparison = compare(Worker(study))
    assert comparison.unlike == {"data": ["a", "b"]}
    assert "The runs differ in data, which may be why their losses differ: a, b." in notes(study, comparison)


def test_what_was_trained_is_what_is_asked_for(corpus: Path, tmp_path: Path) -> None:
    """A base that changes while the study runs, a default that another version changes, a run without a loss."""
    file = study_file(tmp_path, corpus, variants=CHAIN)
    worker = Worker(read_study(file))
    first, second = worker.pending()[:2]
    assert first.name
    base = tmp_path / "base.yaml"
    content = base.read_text()
    base.write_text(content.replace("threshold: ", "threshold: 0.5 # "))
    with pytest.raises(UserError, match=r"base\.yaml has changed since the study began; start the same command again"):
        worker._execute(first)
    assert not first.folder.exists()

    base.write_text(content)
    pretend(worker, cost, lambda run: None if run == second else 3.0)
    first.file("yaml").parent.mkdir()
    first.file("yaml").write_text(first.config().to_yaml().replace("beta2: 0.95", "beta2: 0.9"))
    with pytest.raises(UserError, match=r"was trained with optimizer\.beta2 0\.9, which is 0\.95 now; remove this"):
        compare(Worker(read_study(file)))
    first.file("yaml").write_text(first.config().to_yaml())
    compare(Worker(read_study(file)))
    metrics = first.folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"validation_loss": 3.0', '"validation_loss": null'))
    with pytest.raises(UserError, match="has no validation loss; remove it, so that the study runs it again"):
        compare(Worker(read_study(file)))


def test_edges_are_those_of_numbers() -> None:
    grid = {"a": ("2e-2", "1e-2", "4e-2"), "b": ("1", "2"), "c": ("silu", "none"), "d": ("1",)}
    variant = Variant("v", None, {}, grid, ("tokens",))
    point = (("a", "2e-2"), ("b", "1"), ("c", "silu"), ("d", "1"))
    assert variant.at_an_edge(point) == ["b"]
    assert variant.at_an_edge((("a", "1e-2"),)) == variant.at_an_edge((("a", "4e-2"),)) == ["a"]


def test_equal_settings_are_one_run(corpus: Path, tmp_path: Path) -> None:
    """Two variants that differ in name alone, and a rate written in two ways."""
    variants = {"a": {}, "b": {"control": "a"}, "c": {"control": "a", "settings": {"optimizer.lr": "0.003"}}}
    study = read_study(study_file(tmp_path, corpus, variants=variants, seeds=[0]))
    assert len({run.name for run in Worker(study).runs()}) == 1
    assert os.path.commonpath([run.folder for run in Worker(study).runs()]).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("count", "text"), [(8.21e12, "8.21 T"), (999.0, "999"), (1.3e18, "1.30 E"), (2e21, "2.00 Z"), (math.nan, "-")]
)
def test_operations_have_a_unit(count: float, text: str) -> None:
    assert operations(count) == text


@pytest.mark.parametrize("file", sorted((ROOT / "configs/studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_studies_that_come_with_it_are_valid(file: Path) -> None:
    study = read_study(file)
    assert len(study.variants) > 1 and len(study.seeds) >= 3
