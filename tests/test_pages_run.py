"""The commands and Python blocks of the pages that can run anywhere, run."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from cluster_tools import launch_environment
from pages import PAGES, ROOT
from sharing import nightly, slow

import inrank_dist as inrank
from inrank_dist.commands.main import main

SMALL = """
model: {num_layers: 2, num_heads: 2, hidden_size: 32, max_seq_len: 16, layer_crossing: true}
lowrank: {interval: 2, warmup_steps: 4, buffer: 2, initial_rank: 2}
train: {steps: 6, global_batch_size: 4, micro_batch_size: 2}
data: {max_bytes: 300000, validation_bytes: 20000, cache_dir: cache}
tokenizer: {vocab_size: 400, max_training_bytes: 200000}
checkpoint: {interval: 2, keep: 9}
eval: {interval: 0, sample_tokens: 4}
"""
"""What my.yaml and the quickstart hold where they are trained."""

SHRUNK = {
    "--from-step 8000": "--from-step 4",
    "train.steps 10000": "train.steps 8",
    "train.steps 2000": "train.steps 8 --run.dir runs/longer",
}

ELSEWHERE = {
    r"inrank plan --config configs/(gpt2|llama)": "test_the_sizing_examples_are_what_plan_prints, below",
    r"inrank bench( --.*)?$|inrank bench (data|decision|parity|checkpoint)": "tests/test_bench*.py",
    r"inrank study (?!.*--dry-run)": "tests/test_study.py",
    r"inrank theory \w": "tests/test_theory.py",
}
"""Commands that take minutes or more -> the tests that run them smaller. test_pages.py parses them."""


def everywhere() -> list[str]:
    """The commands of the pages that any machine can run in seconds, each once."""
    found = [
        command
        for page in PAGES
        for command in pages.commands(page)
        if not (command.inline and len(command.words) == 2)
    ]
    texts = [re.sub(r"^docker run --rm inrank_dist (?=inrank )", "", command.text) for command in found]
    ours = [text for text in texts if re.match(r"inrank |launch/torchrun.sh (?!.*-N)(?=\w)", text)]
    return [*dict.fromkeys(text for text in ours if not any(re.match(each, text) for each in ELSEWHERE))]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout with a small quickstart, in which it and my.yaml have been trained."""
    folder, before = tmp_path_factory.mktemp("checkout"), Path.cwd()
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "launch").symlink_to(ROOT / "launch")
    (folder / "my.yaml").write_text(SMALL)
    (folder / "configs/quickstart.yaml").write_text(SMALL + "run: {name: quickstart}\noptimizer: {name: lora_muon}\n")
    os.chdir(folder)
    for name, config in {"quickstart": "configs/quickstart.yaml", "my": "my.yaml"}.items():
        assert main(["train", "--config", config, "--run.dir", f"runs/{name}"]) == 0
    for name in ("dense-0", "dense-1", "inrank-0", "inrank-1"):
        shutil.copytree("runs/my", f"runs/{name}")
    yield folder
    os.chdir(before)


PRINTED = [text for text in everywhere() if re.match(r"inrank (plan|train .*--dry-run)", text)]
"""Commands that take seconds with any config."""


@pytest.mark.slow
@pytest.mark.parametrize("text", PRINTED)
@pytest.mark.parametrize("name", [*pages.own_configs()])
def test_a_command_with_the_configs_as_they_are_printed(
    text: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another batch or number of processes could hide that those of the page do not fit."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("text")
    for file, words in pages.own_configs().items():
        (tmp_path / file).write_text(words.replace("tokenizer: {path: tokenizer.json}", ""))
    assert main(text.replace(" my.yaml", f" {name}").split()[1:]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for text in everywhere() if text not in PRINTED])
def test_a_command_of_the_pages(text: str, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    for words, fewer in SHRUNK.items():
        text = text.replace(words, fewer)
    command = pages.Command("", 0, text, False)
    if command.words[0] == "inrank":
        try:
            status = main(command.words[1:])
        except SystemExit as end:  # --help
            status = end.code
        assert status == 0
    else:
        done = subprocess.run(command.words, env=launch_environment(), capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr


@pytest.mark.timeout(600)
@pytest.mark.parametrize("row", [slow(0), nightly(1), nightly(2)])
def test_the_sizing_examples_are_what_plan_prints(row: int, capsys: pytest.CaptureFixture[str]) -> None:
    section = pages.read("launch/README.md").partition("## Hardware sizing")[2].partition("\n## ")[0]
    command = re.findall(r"^inrank (plan \S+ \S+ \S+ \S+ \S+ \S+)", section, re.MULTILINE)[row]
    cells = [cell.split(", ") for cell in re.findall(r"^\| `.*$", section, re.MULTILINE)[row].split(" | ")]
    assert cells[0][0].strip("| `") in command and f"--world-size {cells[0][1]}" in command
    assert main(command.replace("configs/", f"{ROOT}/configs/").split()) == 0
    printed = dict(re.findall(r"^(\w[^\d\n]*?)(?:  +|  yes +)(.*)$", capsys.readouterr().out, re.MULTILINE))
    names = (
        "parameters",
        "held",
        "at most in a step",
        "fits, share of the memory",
        "sent in a step",
        "time of a step, lower bound, ms",
    )
    for name, cell in zip(names, cells[1:], strict=True):
        assert re.findall(r"[\d.]+", printed[name]) == re.findall(r"[\d.]+", ", ".join(cell)), name


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
