"""The records of a run hold what plots and comparisons need, and each is what it says."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Run, short_config, train, trained_once

from inrank_dist.data import prepare
from inrank_dist.data.settings import DataSettings, TokenizerSettings
from inrank_dist.lowrank.criterion import explained_ratio
from inrank_dist.lowrank.updates import recorded_spectrum
from inrank_dist.report.history import History
from inrank_dist.report.timeline import AXES, timeline


@pytest.fixture(scope="module")
def run(corpus: Path) -> Run:
    return trained_once(short_config(corpus, eval__interval=4))


def test_every_record_has_its_wall_time(run: Run) -> None:
    times = [record["time"] for record in run.records]
    assert times == sorted(times) and time.time() - 3600 < times[0] <= times[-1] <= time.time()


def test_steps_have_time_operations_memory_and_parameters(run: Run) -> None:
    steps, (summary,) = run.of_kind("step"), run.of_kind("summary")
    for key in ("seconds", "flops", "tokens"):
        values = [record[key] for record in steps]
        assert values == sorted(set(values)) and values[0] > 0, key
    assert steps[-1]["flops"] == summary["flops"] and steps[-1]["parameters"] == summary["parameters"]
    assert all(2**26 < record["resident_memory"] < 2**36 for record in steps)
    assert all("peak_memory" not in record for record in steps), "on a GPU only"
    placed = timeline("run", History(run.records))
    assert set(placed.axes) == {*AXES} and placed.axes["step"][0] == 0 and placed.axes["flops"][-1] == summary["flops"]


def test_a_decision_records_the_spectrum_that_it_was_made_on(run: Run) -> None:
    """The effective rank and the explained ratio of the decision follow from the recorded singular values."""
    checks = run.of_kind("rank_check")
    assert len(checks) == 3
    for check in checks:
        for entry in check["layers"].values():
            sigma = torch.tensor(entry["sigma"], dtype=torch.float64)
            assert entry["indices"] == list(range(1, len(sigma) + 1)) and (sigma.diff() <= 0).all()
            assert float(sigma.norm()) == pytest.approx(entry["norm"], rel=1e-5)
            assert float(sigma.sum() / sigma[0]) == pytest.approx(entry["effective_rank"], rel=1e-5)
            ratio = explained_ratio(sigma, min(entry["shape"]), "energy")
            assert float(ratio[min(entry["rank"], len(sigma))]) == pytest.approx(entry["reached"], abs=1e-5)


def test_null_spectra_are_of_every_shape_and_of_norm_one(run: Run) -> None:
    for check in run.of_kind("rank_check"):
        shapes = {tuple(sorted(entry["shape"])) for entry in check["layers"].values()}
        assert {tuple(sorted(each["shape"])) for each in check["null_spectra"]} == shapes
        for each in check["null_spectra"]:
            assert np.linalg.norm(each["sigma"]) == pytest.approx(1, rel=1e-5)


def test_a_long_spectrum_is_recorded_in_few_numbers() -> None:
    sigma = torch.linspace(2, 1, 4096, dtype=torch.float64)
    told = recorded_spectrum(sigma)
    assert len(told["sigma"]) == len(told["indices"]) < 100
    assert told["indices"][:64] == list(range(1, 65)) and told["indices"][-1] == 4096
    assert told["sigma"] == pytest.approx([float(sigma[index - 1]) for index in told["indices"]], rel=1e-5)


def sources(folder: Path, **changes: Any) -> DataSettings:
    settings: dict[str, Any] = {"source": "files", "cache_dir": str(folder / "cache")}
    settings |= {"paths": [str(folder / "train.txt")], "validation_paths": [str(folder / "valid.txt")]}
    return DataSettings(**settings | changes)


def test_bytes_per_token_are_those_of_the_validation_text(tmp_path: Path) -> None:
    """Bytes, not characters, and of the validation text alone; separators are tokens without bytes."""
    (tmp_path / "train.txt").write_text("the cat sat on the mat, and the dog lay on the log\n" * 400)
    text = "caf\u00e9 \u4e2d\u6587 on the mat\n" * 60
    (tmp_path / "valid.txt").write_text(text)
    data = prepare(sources(tmp_path), TokenizerSettings(vocab_size=300), 16, progress=False)
    tokens = len(data.tokenizer.encode(text)) + 1
    assert data.bytes_per_token == len(text.encode()) / tokens
    data.tokenizer.save(tmp_path / "tokenizer.model")
    for name in ("train", "valid"):
        np.save(tmp_path / f"{name}.npy", np.array(data.tokenizer.encode(text) * 20))
    known = TokenizerSettings(vocab_size=300, path=str(tmp_path / "tokenizer.model"))
    files = {"paths": [str(tmp_path / "train.npy")], "validation_paths": [str(tmp_path / "valid.npy")]}
    assert prepare(sources(tmp_path, source="tokens", **files), known, 16, progress=False).bytes_per_token is None


def test_bits_per_byte_are_the_loss_by_bytes(run: Run, corpus: Path) -> None:
    config = short_config(corpus)
    data = prepare(config.data, config.tokenizer, config.model.max_seq_len, progress=False)
    assert data.bytes_per_token is not None and data.bytes_per_token > 1
    for record in run.of_kind("eval"):
        assert record["bits_per_byte"] == pytest.approx(record["loss"] / math.log(2) / data.bytes_per_token)
    (summary,) = run.of_kind("summary")
    assert summary["bits_per_byte"] == run.of_kind("eval")[-1]["bits_per_byte"]


def test_without_known_bytes_there_are_no_bits_per_byte(corpus: Path) -> None:
    """They are left out, never guessed."""

    def forget(trainer: Any) -> None:
        object.__setattr__(trainer.data, "bytes_per_token", None)

    recorder, _ = train(short_config(corpus, lowrank__mode="full", train__steps=1, eval__interval=1), hook=forget)
    figures = [record for record in recorder.records if record["kind"] in ("eval", "summary")]
    assert len(figures) == 2 and all("bits_per_byte" not in record and record["perplexity"] > 1 for record in figures)
