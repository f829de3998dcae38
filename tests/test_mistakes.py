"""The user's mistakes, through the command line: status 2, one line that names the value, nothing left half written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
import sentencepiece
import torch
import yaml
from runs import Fails, the_error

from inrank_dist.commands.main import main
from inrank_dist.engine import zero_settings

TEXT = "the rank of a factor grows when the modes it has no longer explain what was learned so far "

SETTINGS: dict[str, dict[str, object]] = {
    "model": {"num_layers": 2, "num_heads": 2, "hidden_size": 32, "max_seq_len": 16},
    "lowrank": {"targets": ["all"], "initial_rank": 2, "buffer": 2, "interval": 2, "warmup_steps": 24},
    "train": {"steps": 30, "global_batch_size": 8, "micro_batch_size": 2},
    "data": {"source": "files", "validation_fraction": 0.2},
    "tokenizer": {"vocab_size": 300},
    "checkpoint": {"interval": 2},
    "eval": {"interval": 0, "sample_tokens": 0},
    "log": {"interval": 1},
}


def write_config(folder: Path) -> Path:
    """A corpus of short documents, and a config that is right, with everything below ``folder``."""
    (folder / "corpus").mkdir()
    for name in ("a", "b"):
        (folder / "corpus" / f"{name}.txt").write_text(f"{name} " + TEXT * 50)
    places = {"paths": [f"{folder}/corpus/*.txt"], "cache_dir": f"{folder}/cache"}
    settings = SETTINGS | {"data": SETTINGS["data"] | places, "run": {"dir": f"{folder}/run"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


def nothing_half_written(folder: Path) -> None:
    """No run folder; in the cache at most the lock and the reason of the failure."""
    assert not (folder / "run").exists()
    left = [path.name for path in (folder / "cache").glob("*")] if (folder / "cache").exists() else []
    assert [name for name in left if ".lock." not in name and not name.endswith(".failed")] == []


def contents(run_folder: Path) -> dict[Path, bytes]:
    """All that a run folder holds but the lock, which says who was the last to look."""
    files = (path for path in run_folder.rglob("*") if path.is_file() and not path.name.startswith(".lock."))
    return {path: path.read_bytes() for path in files}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a corpus and a config; each test spoils something."""
    write_config(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps, with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder)
    assert main(["train", "--config", str(config), "--train.steps", "4", "--lowrank.warmup_steps", "4"]) == 0
    return folder / "run"


@pytest.fixture
def damaged(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    shutil.copytree(trained.parent, tmp_path / "copy")
    config = tmp_path / "copy" / "config.yaml"
    config.write_text(config.read_text().replace(str(trained), str(tmp_path / "copy" / "run")))
    return tmp_path / "copy" / "run"


# The settings.


@pytest.mark.parametrize(
    ("words", "says"),
    [
        # words that are no settings
        ("--lowrnk.threshold 0.8", "'lowrnk.threshold'; did you mean 'lowrank.threshold'?"),
        ("--lowrank.treshold 0.8", "'lowrank.treshold'; did you mean 'lowrank.threshold'?"),
        ("--train.steps", "--train.steps lacks its value"),
        ("steps=3", "'steps=3' is no option"),
        ("--train.batch_size 8", "did you mean 'train.global_batch_size' or 'train.micro_batch_size'?"),
        # types
        ("--train.steps many", "train.steps is many; write a whole number"),
        ("--train.steps 2.5", "train.steps is 2.5; write a whole number"),
        ("--train.steps null", "train.steps is null; write a whole number"),
        ("--train.compile maybe", "train.compile is maybe; write true or false"),
        ("--lowrank.targets mlp", "lowrank.targets is mlp; write [mlp]"),
        ("--lowrank.mode grow", "lowrank.mode is grow; write one of full, fixed, inrank, efficient"),
        ("--train.precision fp8", "train.precision is fp8; write one of fp32, bf16"),
        ("--optimizer.lr nan", "optimizer.lr is nan; write a number"),
        ("--train.cuda_graph true", "train.cuda_graph is true but train.compile is false; write train.compile: true"),
        (
            "--train.cuda_graph true --train.compile true --parallel.engine fsdp",
            "train.cuda_graph is true but parallel.engine is fsdp, whose weights move; write parallel.engine: ddp",
        ),
        (
            "--train.cuda_graph true --train.compile true --train.micro_batch_size 2",
            "train.cuda_graph is true but a step has",
        ),
        ("--train.profile 3", "train.profile is 3; write [3]"),
        ("--train.profile [a]", "train.profile is [a]; write a list such as [1,2]"),
        ("--train.profile [0]", "train.profile has step 0; write numbers of steps from 1 on"),
        ("--train.peak_tflops 0", "train.peak_tflops is 0"),
        # the model
        ("--model.num_heads 5", "5 does not divide; write model.num_heads 4 or 8, or model.hidden_size 35"),
        ("--model.dropout 1", "model.dropout is 1.0"),
        ("--model.num_kv_heads 1", "model.num_kv_heads is 1"),
        ("--model.num_layers 0", "model.num_layers is 0"),
        # the rank
        ("--lowrank.initial_rank 40", "lowrank.initial_rank is 40"),
        ("--lowrank.mode fixed --lowrank.initial_rank 33", "(in, out) of blocks.0.attention.q is 32; write at most 32"),
        ("--lowrank.threshold 1.5", "lowrank.threshold is 1.5"),
        ("--lowrank.buffer 0", "lowrank.buffer is 0"),
        ("--lowrank.multiple_of 4", "lowrank.initial_rank is 2, not a multiple of lowrank.multiple_of 4; write 4"),
        ("--lowrank.freeze_step 10", "lowrank.freeze_step is 10"),
        ("--lowrank.freeze_step 31", "lowrank freezes at step 31 but train.steps is 30"),
        ("--lowrank.base none --lowrank.dense_fraction 0.99", "lowrank.dense_fraction is 0.99 but train.steps is 30"),
        (
            "--lowrank.base none --lowrank.dense_fraction 0.5 --lowrank.freeze_step 10",
            "the layers are dense until step 15; write a freeze_step of at least 15",
        ),
        ("--lowrank.mode inrank --lowrank.warmup_steps 31", "lowrank.warmup_steps is 31 but train.steps is 30"),
        ("--lowrank.init spectral", "lowrank.init is spectral"),
        ("--lowrank.targets [embed]", "'embed' matches no linear layer"),
        ("--lowrank.targets ['mlp(']", "'mlp(' is not a regular expression"),
        ("--lowrank.max_rank_fraction 0", "lowrank.max_rank_fraction is 0"),
        ("--lowrank.frobenius_decay=-1", "lowrank.frobenius_decay is -1"),
        (
            "--lowrank.frobenius_decay=1 --lowrank.frobenius_in_loss true --parallel.engine zero2",
            "write parallel.engine: fsdp, or lowrank.frobenius_in_loss: false",
        ),
        # the training
        ("--optimizer.lr -1e-3", "optimizer.lr is -0.001"),
        ("--optimizer.beta2 1", "optimizer.beta2 is 1.0"),
        ("--optimizer.momentum 1", "optimizer.momentum is 1.0; write a number from 0 to below 1"),
        ("--optimizer.matrix_lr 0", "optimizer.matrix_lr is 0.0; write a positive number"),
        ("--optimizer.name muon", "mode efficient trains factors; write optimizer.name: spectron or lora_muon"),
        ("--optimizer.name spectron --lowrank.mode full", "has no factors; write optimizer.name: muon"),
        ("--optimizer.name lora_muon --parallel.engine zero2", "write parallel.engine: fsdp, or optimizer.name: adamw"),
        ("--schedule.warmup_steps 30", "schedule.warmup_steps is 30 of train.steps 30; write fewer than 30"),
        ("--schedule.min_lr_ratio 2", "schedule.min_lr_ratio is 2.0"),
        ("--train.global_batch_size 9", "train.global_batch_size is 9"),
        ("--train.global_batch_size 0", "train.global_batch_size is 0"),
        ("--train.grad_clip -1", "train.grad_clip is -1.0"),
        ("--eval.interval -1", "eval.interval is -1"),
        ("--checkpoint.keep 0", "checkpoint.keep is 0"),
        ("--log.interval 0", "log.interval is 0"),
        ("--run.seed -1", "run.seed is -1"),
        ("--parallel.engine fsdp --parallel.shard_size 2", "parallel.shard_size is 2, which does not divide"),
        ("--parallel.engine fsdp --parallel.offload_optimizer true", "write parallel.engine: zero2 or zero3"),
        ("--parallel.engine zero1 --parallel.offload_optimizer true", "write parallel.engine: zero2 or zero3"),
        ("--parallel.engine zero4", "parallel.engine is zero4; write one of auto, local"),
        ("--parallel.engine zero2 --parallel.deepspeed 5", "parallel.deepspeed is 5; write keys and values such as"),
        *((f"--parallel.engine zero2 --parallel.deepspeed={extra}", says) for extra, says in (
            ('{"gradient_clipping":1}', "sets gradient_clipping, which train.grad_clip decides; write train.grad_clip"),
            ('{"bf16":{"enabled":true}}', "sets bf16, which train.precision decides; write train.precision instead"),
            ('{"zero_optimization":{"stage":2}}', "which parallel.engine decides; write parallel.engine instead"),
            ('{"zero_optimization":{"offload_param":{}}}', "which is not supported with rank events; leave it out"),
            ('{"comunication_data_type":"fp32"}', "which is not passed on; did you mean communication_data_type?"),
            ('{"elasticity":{}}', "which is not passed on; known are zero_optimization, torch_autocast"),
            ('{"zero_optimization":{"overlap_com":true}}', "overlap_com Extra inputs are not permitted"),
            ('{"communication_data_type":"fp17"}', "Invalid communication_data_type"),
            ('{"zero_optimization.overlap_comm":true}', "write zero_optimization: {overlap_comm: ... in braces"),
            ('{"zero_optimization":5}', "sets zero_optimization to 5; write keys and values such as {a: 1}"),
            ('{"zero_optimization":{"offload_optimizer":"cpu"}}', "to 'cpu'; write keys and values such as {a: 1}"),
            ('{"torch_autocast":true}', "sets torch_autocast to True; write keys and values"),
            ('{"torch_autocast":{"bogus":1}}', "sets torch_autocast.bogus, which is not passed on"),
            ('{"zero_optimization":{"cpu_offload_param":true}}', "not supported with rank events; leave it out"),
            ('{"zero_optimization":{"round_robin_gradients":true}}', "not supported with rank events; leave it out"),
            ('{"comms_logger":5}', "parallel.deepspeed is refused by DeepSpeed: "),
            ('{"flops_profiler":5}', "parallel.deepspeed is refused by DeepSpeed: "),
        )),
        # the data
        ("--data.paths []", "data.paths is empty"),
        ("--data.source hub", "data.name is None"),
        ("--data.source hub --data.name x --data.validation_split test", "data.validation_split is 'test'"),
        ("--data.source hub --data.name x --data.validation_split train", "data.validation_split is 'train'"),
        ("--data.join_rows true", "data.join_rows is true"),
        ("--data.validation_fraction 0.9", "data.validation_fraction is 0.9"),
        ("--data.max_bytes 0", "data.max_bytes is 0"),
        ("--tokenizer.vocab_size 100", "tokenizer.vocab_size is 100"),
    ],
)  # fmt: skip
def test_settings(place: Path, fails: Fails, words: str, says: str) -> None:
    assert says in fails("train", "--config", place / "config.yaml", *words.split())
    nothing_half_written(place)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda file: file.unlink(), "config.yaml cannot be read (No such file or directory)"),
        (lambda file: (file.unlink(), file.mkdir()), "config.yaml cannot be read (Is a directory)"),
        (lambda file: file.write_text("train: [\n"), "config.yaml is not valid YAML in line 2"),
        (lambda file: file.write_text(""), "config.yaml holds no settings"),
        (lambda file: file.write_text("- a\n- b\n"), "config.yaml holds no settings"),
        (lambda file: file.write_bytes(b"run: {name: \xff}"), "config.yaml is not UTF-8 text (byte 12)"),
        (lambda file: file.write_text("train: {steps: 2}"), "model.max_seq_len are missing"),
        (lambda file: file.write_text("log: {}\nlog: {}\n"), "line 2, column 1: 'log' is written twice"),
    ],
    ids=["missing", "directory", "invalid", "empty", "list", "bytes", "required", "twice"],
)  # fmt: skip
@pytest.mark.parametrize("command", ["train", "prepare"])
def test_config_file(place: Path, fails: Fails, command: str, spoil: Callable[[Path], object], says: str) -> None:
    spoil(place / "config.yaml")
    assert says in fails(command, "--config", place / "config.yaml")
    nothing_half_written(place)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("trian --config x", "'trian'"),
        ("--config x", "'--config' is not a command"),
        ("train", "required: --config"),
        ("train --config", "--config: expected one argument"),
        ("prepare", "required: --config"),
        ("eval", "required: --run"),
        ("generate --run", "--run: expected one argument"),
        ("inspect --run x --stepp 2", "'--stepp'"),
        ("eval --run x --train.steps 3", "'--train.steps'"),
        ("generate --run x hello", "'hello'"),
        ("report --run x --step 2", "'--step'"),
        ("verify", "required: --run"),
        ("verify --run x --step 2", "'--step'"),
        ("eval --run x --step two", "--step: invalid int value: 'two'"),
        ("generate --run x --tokens 0", "--tokens is 0"),
        ("generate --run x --samples 0", "--samples is 0"),
        ("generate --run x --temperature nan", "--temperature is nan"),
        ("generate --run x --top-k -1", "--top-k is -1"),
    ],
)
def test_words_after_the_command(fails: Fails, words: str, says: str) -> None:
    assert says in fails(*words.split())


# The surroundings.

MEETING = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "words", "says"),
    [
        ({"RANK": "1"}, "", "RANK is 1 but WORLD_SIZE is 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "", "RANK is 2 but WORLD_SIZE is 2"),
        ({"LOCAL_RANK": "1"}, "", "LOCAL_RANK is 1 but WORLD_SIZE is not set; unset LOCAL_RANK for one process"),
        ({"LOCAL_RANK": "-1", "WORLD_SIZE": "2"}, "", "LOCAL_RANK is -1; write 0 to 1"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "", "srun started 8 tasks but not WORLD_SIZE; write srun torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "", "mpirun started 2 tasks but not WORLD_SIZE"),
        ({"RANK": "first"}, "", "RANK is 'first'; write a whole number"),
        ({"LOCAL_RANK": "x"}, "", "LOCAL_RANK is 'x'; write a whole number"),
        ({"WORLD_SIZE": "2"}, "", "WORLD_SIZE is 2 but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "", "WORLD_SIZE is 2 but MASTER_PORT is not set"),
        (MEETING, "", "WORLD_SIZE is 2 but RANK is not set"),
        (MEETING | {"RANK": "0", "MASTER_PORT": "70000"}, "", "MASTER_PORT is 70000; write a port from 1 to 65535"),
        ({"WORLD_SIZE": "2"}, "--parallel.engine local", "parallel.engine is local but 2 processes were started"),
        ({"WORLD_SIZE": "2"}, "--parallel.shard_size 3", "parallel.shard_size is 3, which does not divide the 2"),
        ({"WORLD_SIZE": "3"}, "", "train.global_batch_size is 8"),
    ],
)  # fmt: skip
def test_environment(
    place: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str, says: str
) -> None:
    """Found by each process alone, before any waits for the others."""
    if words or "3" in environment.values():
        environment = MEETING | {"RANK": "0"} | environment
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert says in fails("train", "--config", place / "config.yaml", *words.split())
    nothing_half_written(place)


@pytest.mark.parametrize("key", ["run.dir", "data.cache_dir"])
def test_folder_below_a_file(place: Path, fails: Fails, key: str) -> None:
    """Stands for every folder that cannot be made (tests may run as root, who may write anywhere else)."""
    (place / "file").write_text("")
    error = fails("train", "--config", place / "config.yaml", f"--{key}", place / "file" / "sub")
    assert error.startswith(f"{key} is {place}/file")
    nothing_half_written(place)
    assert (place / "file").read_text() == ""


def test_without_deepspeed(place: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else is done, and without a word of Python's own."""
    monkeypatch.setattr(zero_settings, "find_spec", lambda name: None)
    assert fails("train", "--config", place / "config.yaml", "--parallel.engine", "zero2") == (
        "parallel.engine is zero2, which needs DeepSpeed; write pip install -e '.[deepspeed]' in the checkout, or "
        "parallel.engine: fsdp"
    )
    nothing_half_written(place)


# The data.


def parquet_without_text(corpus: Path) -> None:
    pandas.DataFrame({"body": ["a text", "another"]}).to_parquet(corpus / "rows.parquet")


def jsonl_broken(corpus: Path) -> None:
    (corpus / "rows.jsonl").write_text('{"text": "a"}\n{"text": \n')


def jsonl_of_numbers(corpus: Path) -> None:
    (corpus / "rows.jsonl").write_text('{"text": 1}\n{"text": 2}\n')


def all_empty(corpus: Path) -> None:
    for file in corpus.glob("*.txt"):
        file.write_text("")


def one_document(corpus: Path) -> None:
    (corpus / "b.txt").unlink()


def hardly_any_text(corpus: Path) -> None:
    for file in corpus.glob("*.txt"):
        file.write_text(f"{file.stem} few words")


def white_space(corpus: Path) -> None:
    for size, file in enumerate(corpus.glob("*.txt")):
        file.write_text("\n" * (500 + size))


def not_utf8(corpus: Path) -> None:
    (corpus / "b.txt").write_bytes("caf\xe9".encode("latin-1"))


@pytest.mark.parametrize(
    ("spoil", "words", "says"),
    [
        (None, "--data.paths [{0}/none.txt]", "none.txt', which does not exist; write"),
        (None, "--data.paths [no/*.txt]", f"'no/*.txt', which matches no file ({os.getcwd()}/no/*.txt); write"),
        (None, "--tokenizer.path no.model", f"tokenizer no.model ({os.getcwd()}/no.model) cannot be read"),
        (None, "--data.paths [{0}/*.text]", "*.text', which matches no file"),
        (None, "--data.paths [{0}/corpus]", "corpus', a folder"),
        (None, "--data.paths [{0}/config.yaml]", "config.yaml, which is not supported"),
        (None, "--data.validation_paths [{0}/corpus/a.txt]", "data.paths and data.validation_paths both match"),
        (None, "--data.validation_paths [{0}/none.txt]", "data.validation_paths has"),
        (parquet_without_text, "--data.paths [{0}/corpus/*.parquet]", "data.text_column is 'text'"),
        (jsonl_broken, "--data.paths [{0}/corpus/*.jsonl]", "rows.jsonl"),
        (jsonl_of_numbers, "--data.paths [{0}/corpus/*.jsonl]", "'text', which is a number in line 1 of"),
        (all_empty, "", "data.source files has no training text"),
        (one_document, "", "too few to hold one out"),
        (hardly_any_text, "", "tokenizer.vocab_size is 300, more than the training text can fill"),
        (white_space, "", "nothing but white space"),
        (not_utf8, "", "b.txt is not UTF-8 (byte 3)"),
        (None, "--model.max_seq_len 99999", "(model.max_seq_len + 1)"),
        (None, "--tokenizer.vocab_size 30000", "tokenizer.vocab_size is 30000, more than the training text can fill"),
        (None, "--tokenizer.path {0}/none.model", "none.model cannot be read"),
        (None, "--tokenizer.path {0}/config.yaml", "config.yaml is not a SentencePiece model"),
        (None, "--data.source hub --data.name {0}/corpus --data.config none", "'none' not found"),
    ],
)
@pytest.mark.parametrize("command", ["train", "prepare"])
def test_data(
    place: Path, fails: Fails, command: str, spoil: Callable[[Path], None] | None, words: str, says: str
) -> None:
    if spoil:
        spoil(place / "corpus")
    before = sorted((place / "corpus").iterdir())
    assert says in fails(command, "--config", place / "config.yaml", *words.format(place).split())
    nothing_half_written(place)
    assert sorted((place / "corpus").iterdir()) == before


def test_tokenizer_of_another_vocabulary(place: Path, fails: Fails, trained: Path) -> None:
    model = trained / "checkpoints" / "step-00000004" / "tokenizer.model"
    words = ["--tokenizer.path", model, "--tokenizer.vocab_size", 400]
    assert "has 300 tokens; write tokenizer.vocab_size: 300" in fails(
        "train", "--config", place / "config.yaml", *words
    )
    nothing_half_written(place)


def test_tokenizer_that_changes_text(place: Path, fails: Fails) -> None:
    """SentencePiece's own defaults fold white space."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split() * 20), model_prefix=str(place / "lossy"), vocab_size=30, minloglevel=4
    )
    words = ["--tokenizer.path", place / "lossy.model"]
    assert "lossy.model" in fails("train", "--config", place / "config.yaml", *words)
    nothing_half_written(place)


# Runs and checkpoints.

RESUME = ("train", "--train.steps", 6, "--allow-change", "train.steps", "--lowrank.warmup_steps", 4, "--config")


def test_the_run_that_others_damage_is_good(damaged: Path) -> None:
    """Else the tests below could fail for the wrong reason."""
    assert main([*map(str, RESUME), str(damaged.parent / "config.yaml")]) == 0
    for command in ("eval", "inspect", "report", "verify"):
        assert main([command, "--run", str(damaged)]) == 0


@pytest.mark.parametrize("command", ["eval", "generate", "inspect", "report", "verify"])
def test_a_folder_that_is_no_run(tmp_path: Path, fails: Fails, command: str) -> None:
    assert f"{tmp_path}/none" in fails(command, "--run", tmp_path / "none")
    assert str(tmp_path) in fails(command, "--run", tmp_path)
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file" in fails(command, "--run", tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", ["eval", "generate", "inspect"])
def test_a_step_without_checkpoint(trained: Path, fails: Fails, command: str) -> None:
    error = fails(command, "--run", trained, "--step", 3)
    assert error == f"{trained} holds no checkpoint of step 3; write one of 2, 4"


@pytest.mark.parametrize("command", ["eval", "generate", "inspect", "verify"])
def test_a_run_whose_checkpoints_were_removed(damaged: Path, fails: Fails, command: str) -> None:
    shutil.rmtree(damaged / "checkpoints")
    assert fails(command, "--run", damaged) == f"{damaged} holds no checkpoint; train it first"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--lowrank.threshold 0.8", "lowrank.threshold 0.9, now it is 0.8; write 0.9"),
        ("--lowrank.targets [mlp]", "lowrank.targets [all], now it is [mlp]"),
        ("--model.num_layers 3", "model.num_layers 2, now it is 3"),
        ("--tokenizer.vocab_size 301", "tokenizer.vocab_size 300, now it is 301"),
        ("--run.seed 1", "run.seed 0, now it is 1"),
        ("--train.global_batch_size 16", "train.global_batch_size 8, now it is 16"),
    ],
)
def test_a_resumed_run_with_other_settings(damaged: Path, fails: Fails, words: str, says: str) -> None:
    before = contents(damaged)
    assert says in fails(*RESUME, damaged.parent / "config.yaml", *words.split())
    assert contents(damaged) == before


def test_a_resumed_run_with_other_data(damaged: Path, fails: Fails) -> None:
    """Found only once the data is prepared; the run folder is still as it was."""
    before = contents(damaged)
    words = ["--data.max_bytes", 3000, "--allow-change", "data.max_bytes"]
    assert "restore them" in fails(*RESUME, damaged.parent / "config.yaml", *words)
    assert contents(damaged) == before


def empty(file: Path) -> None:
    file.write_bytes(b"")


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change_format(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("manifest.json", change_format),
        ("manifest.json", Path.unlink),
        ("complete", Path.unlink),
        ("state.json", empty),
        ("state.json", halve),
        ("state.json", Path.unlink),
        ("config.yaml", empty),
        ("config.yaml", Path.unlink),
        ("tokenizer.model", halve),
        ("*.safetensors", empty),
        ("*.safetensors", halve),
        ("*.safetensors", Path.unlink),
    ],
)
@pytest.mark.parametrize("command", ["train", "inspect"])
def test_damaged_checkpoints(
    damaged: Path, fails: Fails, command: str, name: str, damage: Callable[[Path], None]
) -> None:
    """Where the newest alone is damaged, the one before it is used; here both are."""
    files = [*(damaged / "checkpoints").glob(f"*/{name}")]
    assert len(files) == 2
    for file in files:
        damage(file)
    before = contents(damaged)
    words = [*RESUME, damaged.parent / "config.yaml"] if command == "train" else [command, "--run", damaged]
    error = fails(*words)
    assert max(files).name in error and str(max(files).parent) in error
    assert f"{damaged} holds no checkpoint that can be used: restore one, or write another run.dir" in error
    assert contents(damaged) == before


def test_a_damaged_checkpoint_that_is_asked_for(damaged: Path, fails: Fails) -> None:
    """No other is taken in its place."""
    halve(damaged / "checkpoints" / "step-00000004" / "tokenizer.model")
    assert "step-00000004/tokenizer.model is damaged" in fails("generate", "--run", damaged, "--step", 4)
    assert main(["inspect", "--run", str(damaged), "--step", "2"]) == 0


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(
    damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a loud line, and not from the start."""
    empty(damaged / "checkpoints" / "step-00000004" / "state.json")
    assert main([*map(str, RESUME), str(damaged.parent / "config.yaml")]) == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("step-00000004/state.json is damaged" in line for line in warnings)
    records = [json.loads(line) for line in (damaged / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "resume"] == [2]
    assert main(["verify", "--run", str(damaged)]) == 0


def test_text_that_changed_since(place: Path, fails: Fails) -> None:
    """``eval`` on other text than the run's would give a figure that compares to nothing."""
    steps = ["--train.steps", "1", "--lowrank.warmup_steps", "1"]
    assert main(["train", "--config", str(place / "config.yaml"), *steps]) == 0
    (place / "corpus" / "a.txt").write_text(TEXT * 60)
    assert "or the text has changed since" in fails("eval", "--run", place / "run")
    named = ["--data.cache_dir", place / "cache"]
    assert "the data has changed" in fails("eval", "--run", place / "run", *named)


def test_report_of_a_run_with_a_broken_line(damaged: Path, fails: Fails) -> None:
    metrics = damaged / "metrics.jsonl"
    metrics.write_text("not json\n" + metrics.read_text())
    assert "metrics.jsonl line 1 is not a JSON object" in fails("report", "--run", damaged)


# The same as whole processes, where nothing of pytest's stands between.


@pytest.mark.slow
def test_as_processes(place: Path) -> None:
    """The second process of a node says nothing: eight processes would tell the same mistake eight times."""
    world = {"LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    train = ["train", "--config", str(place / "config.yaml")]
    cases: list[tuple[list[str], dict[str, str], str]] = [
        (["--data.paths", f"[{place}/none.txt]"], {}, "none.txt"),
        ([], world | {"RANK": "2"}, "train.global_batch_size is 8"),
        ([], world | {"RANK": "1", "LOCAL_RANK": "1"}, ""),
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "inrank_dist", *train, *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for words, environment, _ in cases
    ]
    outputs = [process.communicate(timeout=100) for process in processes]
    for process, (out, err), (_, _, says) in zip(processes, outputs, cases, strict=True):
        assert out == ""
        assert (says in the_error(process.returncode, err)) if says else (process.returncode, err) == (2, "")
    nothing_half_written(place)


def test_out_of_memory_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, fails: Fails) -> None:
    """A GPU's own error, since there is none here; another start would run into the same, so it counts as a mistake."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB of which ..."
        )

    monkeypatch.setattr("inrank_dist.commands.plan.run", full)
    assert fails("plan", "--config", "any.yaml") == (
        "CUDA out of memory. Tried to allocate 20.00 MiB; write a smaller train.micro_batch_size, "
        "train.activation_checkpointing: true, or start more processes (inrank plan says what a run takes)"
    )
