"""Several processes prepare the same data at once: one does, all agree, and a killed one is no obstacle."""

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from inrank_dist.data import DataSettings, TokenizerSettings, prepare, store
from inrank_dist.errors import UserError

WORLD_SIZE = 3
SPAWN = multiprocessing.get_context("spawn")


class BrokenLock:
    """A lock of a file system without locks: everyone gets it at once."""

    def __init__(self, path: Path) -> None:
        pass

    def acquire(self, timeout: float = 0) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    def release(self) -> None:
        pass


def prepare_small(cache: Path, vocab_size: int) -> Any:
    return prepare(DataSettings(max_bytes=200_000, cache_dir=str(cache)), TokenizerSettings(vocab_size=vocab_size), 32)


def one_process(barrier: Barrier, answers: Queue, root: Path) -> None:
    """Three times all start together: data that can be prepared, data that cannot, and no working lock."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("inrank_dist").addHandler(handler)
    logging.getLogger("inrank_dist").setLevel(logging.INFO)
    for case, vocab_size in (("good", 1000), ("bad", 500_000), ("lockless", 1000)):
        if case == "lockless":
            store.FileLock = BrokenLock  # type: ignore[assignment]
        messages.clear()
        barrier.wait(60)
        try:
            prepared = prepare_small(root / case, vocab_size)
            rows = prepared.train.with_format("numpy")[:]["input_ids"]
            result: object = (prepared.fingerprint, str(prepared.folder), rows.sum().item(), prepared.unigram_entropy)
        except UserError as error:
            result = str(error)
        trained = sum("training a bpe tokenizer" in message and "..." in message for message in messages)
        answers.put((case, result, trained))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each of three processes got in each case, as {case: [(result, tokenizers trained), ...]}."""
    root = tmp_path_factory.mktemp("together")
    barrier, queue = SPAWN.Barrier(WORLD_SIZE), SPAWN.Queue()
    processes = [SPAWN.Process(target=one_process, args=(barrier, queue, root)) for _ in range(WORLD_SIZE)]
    for process in processes:
        process.start()
    found: dict[str, Any] = {"root": root}
    for _ in range(3 * WORLD_SIZE):
        case, result, trained = queue.get(timeout=90)
        found.setdefault(case, []).append((result, trained))
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    return found


def test_one_prepares_and_all_agree(answers: dict[str, Any]) -> None:
    """Eight processes of a machine start at the same moment; seven of them must not repeat the work."""
    results, trained = zip(*answers["good"], strict=True)
    assert len(set(results)) == 1 and isinstance(results[0], tuple)
    assert sum(trained) == 1


def test_all_fail_alike(answers: dict[str, Any]) -> None:
    """Whichever process the user reads, it must tell the same mistake."""
    results, _ = zip(*answers["bad"], strict=True)
    assert len(set(results)) == 1 and "tokenizer.vocab_size is 500000" in results[0]
    kinds = {path.suffix for path in (answers["root"] / "bad").iterdir()}
    assert kinds <= {".lock", ".failed"}, "nothing half-written"


def test_correct_without_a_lock(answers: dict[str, Any]) -> None:
    """Several then prepare, and the atomic rename decides; no folder is mixed or left over."""
    results, _ = zip(*answers["lockless"], strict=True)
    assert len(set(results)) == 1 and isinstance(results[0], tuple)
    assert results[0][0] == answers["good"][0][0][0]
    assert [path.name for path in (answers["root"] / "lockless").iterdir()] == [Path(results[0][1]).name]


def test_two_that_build_at_once_leave_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rename decides even where both are certain to be at work together, as without locks."""
    monkeypatch.setattr(store, "FileLock", BrokenLock)
    both_build = threading.Barrier(2)

    def build(work: Path) -> None:
        (work / "file").write_text("same")
        both_build.wait(30)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(store.make_once, tmp_path / "made", build) for _ in range(2)]:
            done.result(30)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["made", "made/file"]


def test_one_that_waited_repeats_the_reason(tmp_path: Path) -> None:
    """Many processes that each tried, one after another, would fail for minutes. A later start tries again."""
    waiting = threading.Event()
    handler = logging.Handler()
    handler.emit = lambda record: waiting.set()  # type: ignore[method-assign]
    logger = logging.getLogger("inrank_dist")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    building = threading.Event()

    def fail(work: Path) -> None:
        building.set()
        assert waiting.wait(30)
        raise UserError("data.this is wrong")

    def never(work: Path) -> None:
        raise AssertionError("the one that waited must not try")

    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(store.make_once, tmp_path / "made", fail)
            assert building.wait(30)
            second = pool.submit(store.make_once, tmp_path / "made", never)
            for one in (first, second):
                with pytest.raises(UserError, match=r"^data.this is wrong$"):
                    one.result(30)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    store.make_once(tmp_path / "made", lambda work: (work / "file").touch())
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["made"]


def prepare_for_ever(cache: Path) -> None:
    prepare(DataSettings(cache_dir=str(cache)), TokenizerSettings(vocab_size=4000), 32)


def test_a_killed_preparation(tmp_path: Path) -> None:
    """SIGKILL in the middle: nothing that looks complete, no lock that stays, and the next start cleans up."""
    process = SPAWN.Process(target=prepare_for_ever, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*.tmp-*/scratch/train-tokens.arrow*")):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.join()
    assert list(tmp_path.glob(".*.tmp-*")), "killed too late"
    assert not list(tmp_path.glob("stdlib-*"))
    prepared = prepare_small(tmp_path, 1000)
    assert prepared.train_tokens > 0
    assert not list(tmp_path.glob(".*.tmp-*"))


def test_only_litter_is_removed(tmp_path: Path) -> None:
    """A private folder of a process that lives, or may live on another machine, is not litter until it is old."""
    names = {
        "mine": f".a.tmp-{os.getpid()}-x-{socket.gethostname()}",
        "elsewhere": ".a.tmp-1-x-another-host",
        "old": ".b.tmp-1-x-another-host",
        "dead": f".c.tmp-{2**22 + 1}-x-{socket.gethostname()}",
    }
    for name in names.values():
        (tmp_path / name).mkdir()
    os.utime(tmp_path / names["old"], (0, 0))
    store.make_once(tmp_path / "made", lambda work: (work / "file").touch())
    left = {path.name for path in tmp_path.glob(".*.tmp-*")}
    assert left == {names["mine"], names["elsewhere"]}
    assert (tmp_path / "made" / "file").is_file()


def test_a_bug_in_the_building_leaves_nothing(tmp_path: Path) -> None:
    """An error that is not the user's passes as it is, and is not told to others as their mistake."""

    def build(work: Path) -> None:
        (work / "half").touch()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.make_once(tmp_path / "made", build)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".lock"}
