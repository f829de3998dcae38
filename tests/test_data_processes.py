"""Several processes prepare the same data at once: one does, all agree, and a killed one is no obstacle."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from forked import CONTEXT

from inrank_dist.data import DataSettings, TokenizerSettings, prepare
from inrank_dist.runtime import files
from inrank_dist.runtime.errors import UserError
from inrank_dist.runtime.lock import Lock
from inrank_dist.runtime.progress import SWITCH

WORLD_SIZE = 3
pytestmark = pytest.mark.xdist_group("faults")  # beside the others whose processes are forked


def prepare_small(cache: Path, vocab_size: int) -> Any:
    return prepare(DataSettings(max_bytes=200_000, cache_dir=str(cache)), TokenizerSettings(vocab_size=vocab_size), 32)


def one_process(barrier: Barrier, answers: Queue, root: Path) -> None:
    """Twice all start together: data that can be prepared, and data that cannot."""
    os.environ.pop(SWITCH, None)  # progress is off in tests
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("inrank_dist").addHandler(handler)
    logging.getLogger("inrank_dist").setLevel(logging.INFO)
    for case, vocab_size in (("good", 1000), ("bad", 500_000)):
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
    barrier, queue = CONTEXT.Barrier(WORLD_SIZE), CONTEXT.Queue()
    processes = [CONTEXT.Process(target=one_process, args=(barrier, queue, root)) for _ in range(WORLD_SIZE)]
    for process in processes:
        process.start()
    found: dict[str, Any] = {"root": root}
    for _ in range(2 * WORLD_SIZE):
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
    left = (answers["root"] / "bad").iterdir()
    assert all(".lock." in path.name or path.suffix == ".failed" for path in left), "nothing half-written"


def test_a_builder_that_lost_its_lock(tmp_path: Path) -> None:
    """One that stood still for the length of the lease loses its folder as well; it takes what the other has made."""
    built = threading.Event()

    def slow(work: Path) -> None:
        lock = Lock(tmp_path / ".made.lock")
        assert lock._create(2), "as a process on another machine does when the lease is over"
        lock.release()
        files.make_once(tmp_path / "made", fast)
        assert not work.exists()
        (work / "file").write_text("too late")

    def fast(work: Path) -> None:
        built.set()
        (work / "file").write_text("in time")

    files.make_once(tmp_path / "made", slow)
    assert built.is_set() and (tmp_path / "made" / "file").read_text() == "in time"
    assert not list(tmp_path.glob(".*.tmp-*")) and not list(tmp_path.glob(".*.failed"))


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
            first = pool.submit(files.make_once, tmp_path / "made", fail)
            assert building.wait(30)
            second = pool.submit(files.make_once, tmp_path / "made", never)
            for one in (first, second):
                with pytest.raises(UserError, match=r"^data.this is wrong$"):
                    one.result(30)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    files.make_once(tmp_path / "made", lambda work: (work / "file").touch())
    assert sorted(path.name for path in tmp_path.iterdir() if ".lock." not in path.name) == ["made"]


def prepare_for_ever(cache: Path) -> None:
    prepare(DataSettings(cache_dir=str(cache)), TokenizerSettings(vocab_size=4000), 32)


def test_a_killed_preparation(tmp_path: Path) -> None:
    """SIGKILL in the middle: nothing that looks complete, no lock that stays, and the next start cleans up."""
    process = CONTEXT.Process(target=prepare_for_ever, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*.tmp-*/train.arrow")):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.join()
    assert list(tmp_path.glob(".*.tmp-*")), "killed too late"
    assert not list(tmp_path.glob("stdlib-*"))
    prepared = prepare_small(tmp_path, 1000)
    assert prepared.train_tokens > 0
    assert not list(tmp_path.glob(".*.tmp-*"))


def abandoned(folder: Path, name: str, content: str | None = None) -> Path:
    """A private folder as a killed process leaves it."""
    private = folder / f".{name}.tmp-{'0' * 31}{len(list(folder.iterdir())):x}"
    private.mkdir()
    (private / "half").write_text("text")
    content = json.dumps({"made_by": "inrank_dist", "name": name}) if content is None else content
    (private / files.MARKER).write_text(content)
    return private


def test_only_what_is_ours_and_abandoned_is_removed(tmp_path: Path) -> None:
    """Known by what is in it and by the lock of its data set, never by a name or the ID of a process."""
    gone = [abandoned(tmp_path, "made"), abandoned(tmp_path, "other")]
    lock = Lock(tmp_path / ".busy.lock")
    lock.acquire()
    kept = [
        abandoned(tmp_path, "busy"),
        abandoned(tmp_path, "a", "{}"),
        abandoned(tmp_path, "b", "not JSON"),
        abandoned(tmp_path, "c", json.dumps({"made_by": "inrank_dist", "name": "another"})),
    ]
    for name in (".x.tmp-foreign", ".y.tmp-1-2", f".z.tmp-{2**22}-x-{socket.gethostname()}", ".tmp-", "\udcff.tmp-"):
        (tmp_path / name).mkdir()
        kept.append(tmp_path / name)
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / f".made.tmp-{'f' * 32}"
    link.symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".made.failed").write_text("[1, not JSON")
    (tmp_path / "hashes.json").write_text("[1]")
    files.make_once(tmp_path / "made", lambda work: (work / "file").touch())
    lock.release()
    assert (tmp_path / "made" / "file").is_file()
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in [*kept, link, tmp_path / "elsewhere"])


def build_behind_a_barrier(final: Path, building: Event, done: Event) -> None:
    def build(work: Path) -> None:
        (work / "file").write_text("whole")
        building.set()
        assert done.wait(60)
        assert (work / "file").read_text() == "whole"

    files.make_once(final, build)


def test_a_neighbour_in_another_pid_namespace(tmp_path: Path) -> None:
    """Containers have process IDs of their own under one host name: that an ID is not there says nothing."""
    building, done = CONTEXT.Event(), CONTEXT.Event()
    process = CONTEXT.Process(target=build_behind_a_barrier, args=(tmp_path / "first", building, done))
    process.start()
    assert building.wait(60)
    second = "from pathlib import Path; from inrank_dist.runtime import files; import sys; "
    second += "files.make_once(Path(sys.argv[1]), lambda work: (work / 'file').touch())"
    command = [sys.executable, "-c", second, str(tmp_path / "second")]
    if os.geteuid() == 0 and shutil.which("unshare"):
        command = ["unshare", "--pid", "--fork", "--mount-proc", *command]
    subprocess.run(command, check=True, timeout=60)
    done.set()
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "first" / "file").read_text() == "whole" and (tmp_path / "second" / "file").exists()


def test_what_vanished_is_not_published(tmp_path: Path) -> None:
    """All parts are looked at before the rename: a folder that somebody has cleaned up is not a data set."""

    def build(work: Path) -> None:
        (work / "part").write_text("x")

    def check(work: Path) -> None:
        (work / "part").unlink()
        (work / "part").stat()

    with pytest.raises(UserError, match=r"data\.cache_dir is .*cannot be used \(No such file"):
        files.make_once(tmp_path / "made", build, check)
    assert not (tmp_path / "made").exists()


def test_a_bug_in_the_building_leaves_nothing(tmp_path: Path) -> None:
    """An error that is not the user's passes as it is, and is not told to others as their mistake."""

    def build(work: Path) -> None:
        (work / "half").touch()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        files.make_once(tmp_path / "made", build)
    assert all(".lock." in path.name for path in tmp_path.iterdir())
