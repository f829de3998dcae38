"""Several processes divide the work of starting from another model."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from init_from_checks import whole
from pool import Pool
from sharing import slow
from test_export import loaded
from test_init_from import FIXED, Source

from inrank_dist.config import Config
from inrank_dist.train.checkpoint import list_checkpoints

LAYERS = 12
"""In a model of two blocks."""


@pytest.fixture(scope="module")
def gpt2(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(tmp_path_factory.mktemp("gpt2"), corpus, {})


def config_of(gpt2: Source, run: Path, world_size: int, kind: str = "transformers", **changes: Any) -> Config:
    """A batch that three processes can divide; sharded rows."""
    batches = {"train__global_batch_size": 12, "train__micro_batch_size": 2}
    engine = {"parallel__engine": "local" if world_size == 1 else "fsdp"}
    return gpt2.config(kind, run, **FIXED | batches | engine | changes)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {"lowrank__initial_rank": 3}),
        (3, {"lowrank__initial_energy": 0.8}),
        slow(3, {"lowrank__initial_rank": 3}),
        slow(2, {"lowrank__initial_energy": 0.8}),
    ],
)
def test_each_weight_is_cut_in_one_process(
    pool: Pool, gpt2: Source, tmp_path: Path, world_size: int, changes: dict[str, Any]
) -> None:
    """The factors of all are those of one process, bit for bit; no SVD is made twice, and all take part."""
    (alone,) = pool.run("init_from_checks:start", config_of(gpt2, tmp_path / "a", 1, **changes), world_size=1)
    config = config_of(gpt2, tmp_path / "b", world_size, **changes)
    results = pool.run("init_from_checks:start", config, world_size=world_size)
    assert alone["svds"] == LAYERS and len(alone["rows"]) == 2 * LAYERS
    assert sum(result["svds"] for result in results) == LAYERS
    assert all(result["svds"] for result in results)
    assert all(result["table"] == alone["table"] for result in results)
    for name, factor in alone["rows"].items():
        assert torch.equal(whole(results, name), factor), name


@pytest.mark.parametrize(
    ("world_size", "engine", "changes"),
    [
        (1, "local", {"optimizer__name": "lora_muon"}),
        (2, "fsdp", {"optimizer__name": "adamw"}),
        (2, "zero3", {"optimizer__name": "adamw"}),
        slow(2, "ddp", {"optimizer__name": "adamw", "train__precision": "bf16"}),
        slow(3, "fsdp", {"optimizer__name": "lora_muon"}),
        slow(2, "zero2", {"optimizer__name": "adamw"}),
    ],
)
def test_only_factors_are_trained(
    pool: Pool, gpt2: Source, tmp_path: Path, world_size: int, engine: str, changes: dict[str, Any]
) -> None:
    """Embeddings, norms and biases keep their values to the bit, also through growth and a resumed run."""
    grows = {"lowrank__mode": "inrank", "lowrank__base": "frozen", "lowrank__init": "loaded", "lowrank__interval": 3}
    config = gpt2.config(
        "run", tmp_path / "run", train__global_batch_size=12, train__micro_batch_size=2, train__steps=4,
        parallel__engine=engine, lowrank__train_only_factors="true", checkpoint__interval=4, **grows, **changes,
    )  # fmt: skip
    for steps in (4, 8):
        config.train.steps = steps
        run = pool.run("runs:train_in_worker", config, steps > 4, world_size=world_size, timeout=150)[0]
    (start,) = (record for record in run.records if record["kind"] == "start")
    assert start["parameters"] - start["parameters_trained"] == start["parameters_dense"]
    tuned, moved = loaded(tmp_path / "run").model, set()
    before = dict(gpt2.model.named_parameters())
    for name, parameter in tuned.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in ("U", "V"):
            moved.add(leaf) if parameter.any() else None
        elif leaf != "base":
            assert torch.equal(parameter, before[name]), name
    assert moved == {"U", "V"}


def test_a_layer_that_one_process_cannot_cut_ends_all(pool: Pool, gpt2: Source, tmp_path: Path) -> None:
    config = config_of(gpt2, tmp_path / "run", 3)
    results = pool.run("init_from_checks:start", config, {1: "the disk is bad"}, world_size=3, timeout=100)
    assert "of the loaded model cannot be factored: the disk is bad" in results[0]["error"]
    assert {result["error"] for result in results} == {results[0]["error"]}


def test_a_checkpoint_is_hashed_once(pool: Pool, gpt2: Source, tmp_path: Path) -> None:
    (checkpoint,) = list_checkpoints(gpt2.run)
    files = len(list(checkpoint.iterdir())) - 2  # without the manifest and the marker
    config = config_of(gpt2, tmp_path / "run", 2, "run")
    results = pool.run("init_from_checks:start", config, world_size=2)
    assert sum(result["hashed"] for result in results) == files and all(result["hashed"] for result in results)


def test_a_damaged_checkpoint_ends_all(pool: Pool, gpt2: Source, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(gpt2.run, copy)
    (checkpoint,) = list_checkpoints(copy)
    file = next(checkpoint.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    config = config_of(gpt2, tmp_path / "run", 2, "run")
    config.model.init_from = str(copy)
    errors = {result["error"] for result in pool.run("init_from_checks:start", config, world_size=2, timeout=100)}
    (error,) = errors
    assert error.startswith("model.init_from: ") and f"{file} is damaged: its sha256 is not the one in" in error


def test_one_process_without_the_folder_ends_all(pool: Pool, gpt2: Source, tmp_path: Path) -> None:
    """As where only some nodes see the disk: the folder of process 1 lacks the weights."""
    shutil.copytree(gpt2.folders["transformers"], tmp_path / "0")
    shutil.copytree(gpt2.folders["transformers"], tmp_path / "1")
    (tmp_path / "1" / "model.safetensors").unlink()
    config = config_of(gpt2, tmp_path / "run", 2)
    config.model.init_from = str(tmp_path / "{rank}")
    results = pool.run("init_from_checks:start_with_own_folder", config, world_size=2, timeout=100)
    assert {result["error"] for result in results} == {
        f"model.init_from: {tmp_path / '1'} holds no model.safetensors; write a folder with weights in safetensors"
    }
