"""The commands and Python blocks of the pages that can run anywhere, run."""

from pathlib import Path
from typing import Any

import pages
import pytest
import torch

import inrank_dist as inrank

GPT2 = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0}


def make_model() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**GPT2))


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.arange(count * 2 * 16).view(count, 2, 16) % 61
    return [{"input_ids": each, "labels": each} for each in ids]


def run_block(marker: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **names: Any) -> dict[str, Any]:
    """Run the block in a folder; ``names`` are what its text says that the user has."""
    monkeypatch.chdir(folder)
    exec(pages.python_block(marker), names)
    return names


def test_the_loop_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_block("for batch in batches", tmp_path, monkeypatch, make_model=make_model, batches=batches(3))
    assert names["run"].step == 3 and set(names["run"].ranks.values()) == {8}
    assert type(names["dense"]) is type(make_model())


@pytest.mark.slow
def test_the_block_of_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    args = TrainingArguments(tmp_path / "out", max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.arange(6 * 16).view(6, 16) % 61]
    names = {"Trainer": Trainer, "inrank": inrank, "model": make_model(), "args": args, "data": data}
    run_block("Trainer(", tmp_path, monkeypatch, **names)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dense").config.n_embd == 16


@pytest.mark.slow
def test_the_block_of_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    loader = torch.utils.data.DataLoader(torch.arange(6 * 16).view(6, 16) % 61, batch_size=2)
    loader.collate_fn = lambda rows: {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}
    names = {"Accelerator": Accelerator, "inrank": inrank, "torch": torch, "make_model": make_model, "loader": loader}
    found = run_block("Accelerator()", tmp_path, monkeypatch, **names)
    assert found["run"].step == 3 and (tmp_path / "checkpoint").exists()
