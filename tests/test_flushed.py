"""What is renamed to its name for good is on the disk by then: a machine that loses power leaves no short file there.

Power cannot be cut here; the calls of ``fsync`` can be counted.
"""

import os
import pathlib
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from pool import Pool
from runs import short_config, small_config, train

from inrank_dist.config import Config
from inrank_dist.data import prepare
from inrank_dist.train.checkpoint import list_checkpoints
from inrank_dist.train.monitors.jsonl import JsonlMonitor

Key = tuple[int, int]
"""What a file keeps when it is renamed: its number, and its size (of a folder: 0)."""


def key(path: "Path | int") -> Key:
    found = os.stat(path)
    return found.st_ino, 0 if os.path.isdir(path) else found.st_size


class Flushes(AbstractContextManager["Flushes"]):
    """Notes every ``fsync`` and every rename of this process, and really does them."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Key]] = []
        self._patches = ExitStack()

    def __enter__(self) -> "Flushes":
        fsync = os.fsync

        def flushed(file: int) -> None:
            fsync(file)
            self.calls.append(("fsync", key(file)))

        self._patches.enter_context(patch.object(os, "fsync", flushed))
        callers = [
            os,
            getattr(pathlib, "_normal_accessor", None),
        ]  # the latter in Python 3.10, which keeps os's functions
        for name in ("rename", "replace"):
            noted = self._noted(getattr(os, name))
            for caller in filter(None, callers):
                self._patches.enter_context(patch.object(caller, name, noted))
        return self

    def _noted(self, rename: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: Any, target: Any, **options: Any) -> None:
            moved = key(source)
            rename(source, target, **options)
            self.calls.append(("rename", moved))

        return renamed

    def __exit__(self, *_: object) -> None:
        self._patches.close()


def assert_flushed(calls: list[tuple[str, Key]], path: Path, others: list[tuple[str, Key]] | None = None) -> None:
    """Every file and folder, before the rename; ``others`` are the calls of other processes."""
    renamed = calls.index(("rename", key(path)))
    before = {number for kind, number in calls[:renamed] + (others or []) if kind == "fsync"}
    for each in [path, *path.rglob("*")]:
        assert key(each) in before, f"{each.name} was not flushed before it got its name"


def assert_name_flushed(calls: list[tuple[str, Key]], path: Path) -> None:
    """The folder above, after the rename. Data whose name is lost is prepared again; a checkpoint must not be."""
    after = [number for kind, number in calls[calls.index(("rename", key(path))) :] if kind == "fsync"]
    assert key(path.parent) in after, f"the name {path.name} itself was not flushed"


def calls_of_training(config: Config) -> list[tuple[str, Key]]:
    with Flushes() as flushes:
        train(config)
    return flushes.calls


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(corpus: Path, tmp_path: Path, asynchronous: bool) -> None:
    config = short_config(corpus, run__dir=tmp_path, checkpoint__interval=6, checkpoint__keep=3)
    config.checkpoint.async_ = asynchronous
    calls = calls_of_training(config)
    assert len(list_checkpoints(tmp_path)) == 2
    for folder in list_checkpoints(tmp_path):
        assert len(list(folder.iterdir())) >= 6
        assert_flushed(calls, folder)
        assert_name_flushed(calls, folder)


def test_so_are_the_parts_of_every_process(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    config = short_config(corpus, run__dir=tmp_path)
    first, second = pool.run("test_flushed:calls_of_training", config, world_size=2)
    (folder,) = list_checkpoints(tmp_path)
    assert_flushed(first, folder, second)
    assert_name_flushed(first, folder)
    assert {number for kind, number in second if kind == "fsync"} & {key(file) for file in folder.iterdir()}


def test_prepared_data_is_on_the_disk_before_it_has_its_name(corpus: Path, tmp_path: Path) -> None:
    config = small_config(corpus, data__cache_dir=tmp_path)
    with Flushes() as flushes:
        prepare(config.data, config.tokenizer, config.model.max_seq_len, progress=False)
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert folders
    for folder in folders:
        assert_flushed(flushes.calls, folder)


def test_metrics_that_are_cut_are_on_the_disk_before_the_old_ones_go(tmp_path: Path) -> None:
    monitor = JsonlMonitor(tmp_path / "metrics.jsonl")
    for step in range(1, 9):
        monitor.write({"kind": "step", "step": step, "loss": 1.0})
    with Flushes() as flushes:
        monitor.truncate_after(4)
    monitor.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert_flushed(flushes.calls, tmp_path / "metrics.jsonl")
