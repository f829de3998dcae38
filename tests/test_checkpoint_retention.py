"""Which checkpoints are kept."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import small_config, train

from inrank_dist.runtime.errors import UserError
from inrank_dist.train.checkpoint import folder, folder_of, list_checkpoints
from inrank_dist.train.checkpoint.folder import begin, commit, recover, retain, seal
from inrank_dist.train.loop import Trainer


def make(run: Path, step: int, *, ephemeral: bool = False) -> Path:
    """A complete checkpoint with next to nothing in it."""
    final = folder_of(run, step)
    partial = begin(final)
    commit(partial, final, seal(partial, {"state.json": b"{}"}), ephemeral=ephemeral)
    return final


def kept(run: Path) -> list[int]:
    """Steps of all folders with a checkpoint's name."""
    return sorted(int(folder.name[5:]) for folder in (run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("ephemeral", "keep", "keep_every", "left"),
    [
        ((), 1, 0, [6]),
        ((), 2, 0, [5, 6]),
        ((), 9, 0, [1, 2, 3, 4, 5, 6]),
        ((), 1, 2, [2, 4, 6]),
        ((), 2, 3, [3, 5, 6]),
        ((6,), 2, 0, [4, 5, 6]),  # the newest of all stays, whatever it is
        ((4, 5), 2, 0, [3, 6]),  # they do not count
        ((4, 6), 1, 2, [2, 5, 6]),  # nor do they stay for good
        ((1, 2, 3, 4, 5, 6), 2, 0, [6]),
    ],
)
def test_retention(tmp_path: Path, ephemeral: tuple[int, ...], keep: int, keep_every: int, left: list[int]) -> None:
    for step in range(1, 7):
        make(tmp_path, step, ephemeral=step in ephemeral)
    retain(tmp_path, 6, keep=keep, keep_every=keep_every)
    assert kept(tmp_path) == left
    assert not list((tmp_path / "checkpoints").glob("tmp-*"))


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: os.truncate(file, 1)], ids=["missing", "cut"])
@pytest.mark.parametrize("name", ["state.json", "manifest.json", "complete"])
def test_an_incomplete_checkpoint_neither_counts_nor_goes(
    tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    """Counted, it would push out the last one that can be loaded."""
    for step in range(1, 6):
        make(tmp_path, step)
    for step in (1, 4, 5):
        damage(folder_of(tmp_path, step) / name)
    retain(tmp_path, 5, keep=1, keep_every=0)
    assert kept(tmp_path) == [1, 3, 4, 5]


def test_a_damaged_checkpoint_does_not_push_out_the_one_just_saved(tmp_path: Path) -> None:
    """The run went on from step 2, since step 9 has its sizes but not its bytes."""
    for step in (2, 9):
        make(tmp_path, step)
    (folder_of(tmp_path, 9) / "state.json").write_text("[]")
    make(tmp_path, 4)
    retain(tmp_path, 4, keep=1, keep_every=0)
    assert kept(tmp_path) == [4, 9]


def test_a_save_sweeps_what_interrupted_ones_left(tmp_path: Path) -> None:
    """Whatever its kind; what a link leads to is not touched."""
    good, checkpoints = make(tmp_path, 1), tmp_path / "checkpoints"
    shutil.copytree(good, checkpoints / "tmp-step-00000002")
    shutil.copytree(good, checkpoints / "tmp-removed-step-00000003")
    (checkpoints / "tmp-file").write_text("")
    (checkpoints / "tmp-link").symlink_to(good)
    make(tmp_path, 2)
    assert sorted(os.listdir(checkpoints)) == ["step-00000001", "step-00000002"]
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


def test_a_folder_that_is_not_shared_is_no_checkpoint(tmp_path: Path) -> None:
    """Node-local folders: process 0 would list files that it has never seen, and every checkpoint would be useless."""
    final = tmp_path / "checkpoints" / "step-00000004"
    partial = begin(final)
    files = seal(partial, {"state.json": b"{}"})
    elsewhere = {"shard-00002-model-00001-of-00001.safetensors": files["state.json"]}
    with pytest.raises(UserError, match=r"shard-00002-\S+ is missing for process 0; write a run.dir on a file system"):
        commit(partial, final, files | elsewhere, ephemeral=False)
    assert kept(tmp_path) == []


def test_a_kill_while_a_checkpoint_takes_the_place_of_another_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one moment in which no folder has the checkpoint's name."""
    first = make(tmp_path, 4)
    before = (first / "manifest.json").read_bytes()
    rename, calls = Path.rename, iter(range(9))

    def killed(path: Path, target: Path) -> Path:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", killed)
        make(tmp_path, 4)
    assert kept(tmp_path) == []
    recover(tmp_path)
    assert kept(tmp_path) == [4]
    assert (first / "manifest.json").read_bytes() == before
    make(tmp_path, 4)
    recover(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_a_run_keeps_what_its_settings_say(corpus: Path, tmp_path: Path) -> None:
    """After every save: ephemeral ones give way to the next, permanent ones leave but for every twelfth step."""
    config = small_config(
        corpus, run__dir=tmp_path, train__steps=18, lowrank__warmup_steps=18, checkpoint__interval=4,
        checkpoint__ephemeral_interval=3, checkpoint__keep=1, checkpoint__keep_every=12,
    )  # fmt: skip
    make(tmp_path, 1)
    (folder_of(tmp_path, 1) / "state.json").unlink()
    after: dict[int, list[int]] = {}

    def watch(trainer: Trainer) -> None:
        save = trainer.writer.save

        def watched(engine: Any, state: Any, *, ephemeral: bool = False) -> None:
            save(engine, state, ephemeral=ephemeral)
            after[state.step] = kept(tmp_path)

        trainer.writer.save = watched  # type: ignore[method-assign]

    train(config, hook=watch)
    assert after == {
        3: [1, 3],
        4: [1, 4],
        6: [1, 4, 6],
        8: [1, 8],
        9: [1, 8, 9],
        12: [1, 12],
        15: [1, 12, 15],
        16: [1, 12, 16],
        18: [1, 12, 18],
    }


def test_a_save_reads_no_more_checkpoints_than_it_decides_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``keep_every`` thousands may stay for good; each was once read at every save."""
    read: list[int] = []

    def count(path: Path) -> folder.Manifest:
        read.append(int(path.name[-8:]))
        return read_manifest(path)

    read_manifest = folder.read_manifest
    monkeypatch.setattr(folder, "read_manifest", count)
    settled: set[str] = set()
    for step in range(1, 13):
        make(tmp_path, step, ephemeral=step == 9)
        read.clear()
        retain(tmp_path, step, keep=2, keep_every=3, settled=settled)
        assert len(read) <= 5, read
    assert kept(tmp_path) == [3, 6, 11, 12]
    (folder_of(tmp_path, 12) / "complete").unlink()
    make(tmp_path, 13)
    read.clear()
    retain(tmp_path, 13, keep=2, keep_every=3, settled=settled)
    assert kept(tmp_path) == [3, 6, 11, 12, 13], "what is damaged by now does not count among the newest"
