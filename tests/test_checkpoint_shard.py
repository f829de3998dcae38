"""A process's tensor file: torch's layout, every row once, flushed, and no copy of the state in memory."""

import json
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from pool import Pool
from runs import small_config, train, trainer_of
from safetensors import safe_open
from sharing import slow

from inrank_dist.data.hashing import hash_file
from inrank_dist.engine.checkpointable import SavedRows
from inrank_dist.runtime.context import Context
from inrank_dist.runtime.errors import UserError
from inrank_dist.runtime.safetensors_file import content
from inrank_dist.train.checkpoint import find_checkpoint, list_checkpoints, stored_tensors
from inrank_dist.train.checkpoint.shard import shard_name, stage, write_shard
from inrank_dist.train.loop import Trainer


def rows_of(tensors: dict[str, torch.Tensor]) -> list[SavedRows]:
    """All rows of whole tensors."""
    return [
        SavedRows(name, each.shape, each.dtype, 0, len(each), partial(lambda each: each, each))
        for name, each in tensors.items()
    ]


def contents(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata, and dtype, shape and bytes of every tensor, as the library safetensors reads them."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    places = json.loads(metadata.pop("DCP_SHARDING_INFO"))
    tensors = {
        name: (each.dtype, each.shape, each.contiguous().view(torch.uint8).numpy().tobytes(), places[name])
        for name, each in found.items()
    }
    return metadata, tensors


def test_the_file_is_the_one_that_torch_would_write(tmp_path: Path) -> None:
    """Names, shapes, dtypes, places and bytes; a tensor that is not contiguous, and names that JSON escapes."""
    torch.manual_seed(0)
    tensors = {
        "blocks.0.weight": torch.randn(7, 5),
        "norm": torch.randn(3),
        "transposed": torch.randn(4, 6).T,
        "half": torch.randn(5, 3).bfloat16(),
        "double": torch.randn(2, 2).double(),
        'na"me\\ä': torch.randn(2, 3, 4),
    }
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    files = write_shard(ours, 0, rows_of(tensors))
    writer = dcp.HuggingFaceStorageWriter(str(theirs), save_distributed=True)
    dcp.save({name: each.contiguous() for name, each in tensors.items()}, storage_writer=writer, no_dist=True)
    assert sorted(os.listdir(ours)) == sorted(os.listdir(theirs)) == [shard_name(0)] == list(files)
    assert contents(ours / shard_name(0)) == contents(theirs / shard_name(0))
    assert files[shard_name(0)].sha256 == hash_file(ours / shard_name(0))
    assert files[shard_name(0)].bytes == (ours / shard_name(0)).stat().st_size
    read = {name: torch.zeros_like(each) for name, each in tensors.items()}
    dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(ours)), no_dist=True)
    assert all(torch.equal(read[name], each) for name, each in tensors.items())


def test_a_process_without_rows_writes_no_file_but_fetches(tmp_path: Path) -> None:
    """With ZeRO the others wait for it."""
    fetched: list[str] = []

    def fetch(name: str) -> torch.Tensor:
        fetched.append(name)
        return torch.empty(0, 2)

    rows = [SavedRows(name, torch.Size([2, 2]), torch.float32, 2, 0, partial(fetch, name)) for name in "ab"]
    assert write_shard(tmp_path, 3, rows) == {}
    assert (fetched, os.listdir(tmp_path)) == (["a", "b"], [])


MEASURED = """
import sys, torch
from pathlib import Path
from inrank_dist.engine.checkpointable import SavedRows
from inrank_dist.train.checkpoint.shard import stage, write_shard
from inrank_dist.train.memory import peak_resident_bytes

MIB, COUNT, ROWS = 2**20, 12, 2048
tensors = [torch.ones(ROWS, 1024) for _ in range(COUNT)]  # 8 MiB each
rows = [SavedRows(str(i), t.shape, t.dtype, 0, ROWS, t.clone) for i, t in enumerate(tensors)]
write_shard(Path(sys.argv[1]), 0, rows[:2])
peak = lambda: peak_resident_bytes() / MIB
before = peak()
write_shard(Path(sys.argv[1]), 1, rows)
sync = peak() - before
staged = stage(rows)
write_shard(Path(sys.argv[1]), 2, staged)
print(sync, peak() - before)
"""


@pytest.mark.slow
def test_saving_holds_one_tensor_and_staging_one_copy(tmp_path: Path) -> None:
    """Of 96 MiB in 12 tensors, where fetching copies as with ZeRO or from a GPU; resident memory, whoever takes it."""
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)],
        env=os.environ
        | {"MALLOC_MMAP_THRESHOLD_": str(2**20)},  # what is freed is given back, so that the peak is true
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    sync, staged = map(float, ran.stdout.split())
    assert sync < 2.5 * 8
    assert staged < 96 + 2.5 * 8


def test_staged_copies_stay_what_they_were_and_go_when_written(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(3, 2)
    staged = stage(rows_of({"a": tensor}))
    tensor.zero_()
    write_shard(tmp_path, 0, staged)
    with safe_open(tmp_path / shard_name(0), framework="pt") as opened:
        assert opened.get_tensor("a").tolist() == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(KeyError):
        staged[0].fetch()


@pytest.mark.parametrize("behind", ["false", "true"])
def test_everything_is_flushed_before_it_has_its_name(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: str
) -> None:
    """Every file and the folder with its last bytes in it; after the rename the folder above."""
    flushed: list[tuple[str, int]] = []
    fsync, rename = os.fsync, Path.rename

    def seen(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        flushed.append((os.path.relpath(path, tmp_path), os.fstat(descriptor).st_size))
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        if path.name.startswith("tmp-step-"):
            flushed.append(("renamed", 0))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(Path, "rename", renamed)
    train(small_config(corpus, run__dir=tmp_path, lowrank__mode="full", train__steps=2, checkpoint__async=behind))
    names = [name for name, _ in flushed]
    before, after = flushed[: names.index("renamed")], names[names.index("renamed") :]
    sizes = {file.name: file.stat().st_size for file in list_checkpoints(tmp_path)[0].iterdir()}
    place = "checkpoints/tmp-step-00000002"
    assert {Path(name).name: size for name, size in before if Path(name).parent == Path(place)} == sizes
    assert place in dict(before)
    assert "checkpoints" in after


@pytest.mark.parametrize(
    ("engine", "world_size", "shard_size"), [slow("ddp", 3, None), ("fsdp", 4, 2), slow("fsdp", 3, None)]
)
def test_every_row_is_saved_once_and_by_all_alike(
    pool: Pool, corpus: Path, tmp_path: Path, engine: str, world_size: int, shard_size: int | None
) -> None:
    """Replicas share the work; it is a whole checkpoint (``stored_tensors`` counts the rows)."""
    config = small_config(
        corpus, run__dir=tmp_path, lowrank__interval=2, lowrank__warmup_steps=4, train__steps=4,
        train__global_batch_size=world_size, train__micro_batch_size=1, parallel__engine=engine,
        parallel__shard_size=shard_size,
    )  # fmt: skip
    pool.run("runs:train_in_worker", config, world_size=world_size)
    checkpoint = find_checkpoint(tmp_path)
    shards = [(checkpoint.folder / shard_name(rank)).read_bytes() for rank in range(world_size)]
    sizes = [len(content) - 8 - int.from_bytes(content[:8], "little") for content in shards]
    state = sum(4 * torch.Size(each.shape).numel() for each in stored_tensors(checkpoint.folder).values())
    assert sum(sizes) == state
    assert max(sizes) < 1.15 * state / world_size


def fails_in_one(config: Any) -> str:
    """For the pool: the line of this process when process 1 may write only small files."""
    context = Context()
    context.start(60, always=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        trainer: Trainer = trainer_of(config, context)
        trainer.take_step()
        if context.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))
        try:
            trainer.save()
            trainer.writer.finish()
        except UserError as error:
            return str(error)
        return "saved"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        trainer.loader.close()
        trainer.writer.close()
        context.stop()


@pytest.mark.parametrize(
    ("engine", "behind"),
    [
        ("fsdp", "false"),
        ("fsdp", "true"),
        pytest.param("zero3", "false", marks=pytest.mark.slow),
        pytest.param("zero3", "true", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fails_one_process_is_told_by_all(
    pool: Pool, corpus: Path, tmp_path: Path, engine: str, behind: str
) -> None:
    """None waits for the one, also where tensors are fetched together."""
    config = small_config(corpus, run__dir=tmp_path, parallel__engine=engine, checkpoint__async=behind)
    config.parallel.timeout_seconds = 30
    for line in pool.run("test_checkpoint_shard:fails_in_one", config, world_size=2, timeout=90):
        assert "step-00000001 could not be written (File too large); make the folder writable" in line
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(64.0).as_strided((64, 1), (1, 32)),  # a factor of rank 1 that comes from an SVD
        torch.arange(64.0).as_strided((1, 1), (5, 7)),
        torch.arange(64.0).view(8, 8)[:, 1:3],
        torch.arange(64.0).view(8, 8).T,
        torch.arange(3, dtype=torch.bfloat16),
        torch.tensor(3.0),
        torch.zeros(0, 3),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)}-{tensor.stride()}",
)
def test_any_layout_in_memory_gives_the_same_bytes(tensor: torch.Tensor) -> None:
    expected = tensor.clone(memory_format=torch.contiguous_format).flatten().tolist()
    assert _values(content(tensor), tensor.dtype) == expected


def _values(view: memoryview, dtype: torch.dtype) -> list[float]:
    return torch.frombuffer(bytearray(view), dtype=dtype).tolist() if view.nbytes else []
