"""The lock on a folder: one holder at a time, and none that is dead."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inrank_dist.runtime import lock as module
from inrank_dist.runtime.lock import Lock, LockHeld, LockLost

HOLD = """
    import os, sys
    from pathlib import Path
    from inrank_dist.runtime.lock import Lock
    lock = Lock(Path(sys.argv[1]))
    lock.acquire(0)
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process that runs a program and has printed its first line, which is its ``first``."""
    processes = []

    def run(program: str, *arguments: object, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        argv = [*before, sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        process.first = process.stdout.readline().strip()  # type: ignore[attr-defined]
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait(timeout=30)


def test_says_who_holds_it_and_goes_with_its_process(tmp_path: Path, start: Callable[..., subprocess.Popen]) -> None:
    path = tmp_path / ".lock"
    process = start(HOLD, path)
    with pytest.raises(LockHeld) as held:
        Lock(path).acquire(0)
    owner = held.value.owner
    assert owner is not None and owner == Lock(path).holder()
    assert (owner.host, str(owner.pid)) == (os.uname().nodename, process.first)
    assert str(owner.pid) in str(held.value) and owner.host in str(held.value) and owner.since in str(held.value)
    process.send_signal(signal.SIGSTOP)  # slow is not dead
    with pytest.raises(LockHeld):
        Lock(path).acquire(0)
    process.kill()
    process.wait()
    assert Lock(path).holder() is None
    Lock(path).acquire(0)


def test_a_released_lock_is_free_and_leaves_one_file(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    for _ in range(3):
        with Lock(path) as lock:
            lock.check()
            assert lock.held
            with pytest.raises(LockHeld):
                Lock(path).acquire(0)
        assert not lock.held and lock.holder() is None
    assert len(list(tmp_path.iterdir())) == 1


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from inrank_dist.runtime.lock import Lock
        count = Path(sys.argv[1])
        for _ in range(10):
            with Lock(count.with_name(".lock")):
                value = int(count.read_text())
                count.write_text(str(value + 1))
    """)
    argv = [sys.executable, "-c", program, str(tmp_path / "count")]
    for process in [subprocess.Popen(argv) for _ in range(6)]:
        assert process.wait(timeout=120) == 0
    assert (tmp_path / "count").read_text() == "60"


def test_waits_and_tells_once(tmp_path: Path, start: Callable[..., subprocess.Popen]) -> None:
    process = start(HOLD, tmp_path / ".lock")
    told = []

    def on_wait(held: LockHeld) -> None:
        told.append(held)
        process.stdin.close()  # its end

    Lock(tmp_path / ".lock").acquire(None, on_wait)
    assert len(told) == 1 and str(told[0].owner.pid) == process.first


def test_a_forked_child_does_not_keep_its_parents_lock(tmp_path: Path, start: Callable[..., subprocess.Popen]) -> None:
    fork = "\n    child = os.fork()\n    if child == 0:\n        os.read(0, 1)\n        os._exit(0)\n    print"
    process = start(HOLD.replace("\n    print", fork), tmp_path / ".lock")
    with pytest.raises(LockHeld):
        Lock(tmp_path / ".lock").acquire(0)
    process.kill()
    process.wait()
    Lock(tmp_path / ".lock").acquire(30)  # the child lives until its stdin ends
    process.stdin.close()


UNSHARE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc")


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0,
    reason="this machine does not let us make a pid namespace",
)
def test_containers_with_one_host_name(tmp_path: Path, start: Callable[..., subprocess.Popen]) -> None:
    """In its namespace the holder is process 1; outside, process 1 is another one, which lives for ever."""
    process = start(HOLD, tmp_path / ".lock", before=UNSHARE)
    assert process.first == "1"
    with pytest.raises(LockHeld):
        Lock(tmp_path / ".lock").acquire(0)
    inside = textwrap.dedent(HOLD)
    second = subprocess.run(
        [*UNSHARE, sys.executable, "-c", inside, str(tmp_path / ".lock")], capture_output=True, text=True, timeout=60
    )
    assert second.returncode != 0 and "LockHeld" in second.stderr
    process.kill()
    process.wait()
    Lock(tmp_path / ".lock").acquire(10)


def test_a_killed_holder_in_the_act_of_taking_it(tmp_path: Path) -> None:
    """It left a file without a name: nobody can know its machine, so it is free when the lease is over."""
    (tmp_path / ".lock.7").touch()
    assert Lock(tmp_path / ".lock").holder() is not None
    Lock(tmp_path / ".lock", lease_seconds=0.5).acquire(0)
    assert [file.name for file in tmp_path.iterdir()] == [".lock.8"]


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, which this machine does not have."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def another_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called, this process is on another machine, of which there is only one here."""
    return lambda: monkeypatch.setattr(module, "_machine", lambda: "another")


def test_without_locks_a_heartbeat_keeps_it(tmp_path: Path, no_locks: None) -> None:
    path = tmp_path / ".lock"
    with Lock(path, lease_seconds=1.0) as lock:
        with pytest.raises(LockHeld):
            Lock(path, lease_seconds=30.0).acquire(0)
        lock.check()
    Lock(path, lease_seconds=30.0).acquire(0)


def test_without_a_heartbeat_it_goes_to_the_next_and_the_first_one_learns_it(
    tmp_path: Path, another_machine: Callable[[], None], start: Callable[..., subprocess.Popen]
) -> None:
    """What a machine that is gone looks like from another one, even where the server keeps its locks."""
    path = tmp_path / ".lock"
    lost = HOLD.replace("sys.stdin.read()", "sys.stdin.read(1); lock.check()").replace(
        "(0)\n", "(0)\n    lock._stop.set()\n"
    )
    process = start(lost, path)
    another_machine()
    second = Lock(path, lease_seconds=0.5)
    second.acquire(0)
    _, _ = process.stdin.write("x"), process.stdin.close()
    assert process.wait(timeout=60) != 0
    second.check()


def test_a_holder_on_another_machine_that_lives_is_found_alive(
    tmp_path: Path, another_machine: Callable[[], None], start: Callable[..., subprocess.Popen]
) -> None:
    process = start(HOLD.replace("[1])", "[1]), 1.0"), tmp_path / ".lock")
    another_machine()
    with pytest.raises(LockHeld) as held:
        Lock(tmp_path / ".lock", lease_seconds=30.0).acquire(0)
    assert held.value.owner is not None and str(held.value.owner.pid) == process.first


def test_one_who_slept_while_others_came_and_went_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".lock"
    sleeper, first, second = Lock(path), Lock(path), Lock(path)
    create = Lock._create

    def slow(self: Lock, number: int) -> bool:
        if self is sleeper and number == 1:
            first.acquire()
            first.release()
            second.acquire()
        return create(self, number)

    monkeypatch.setattr(Lock, "_create", slow)
    with pytest.raises(LockHeld):
        sleeper.acquire(0)
    second.check()
    assert [file.name for file in tmp_path.iterdir()] == [".lock.2"]


def test_trouble_is_not_freedom(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Lock(tmp_path / "missing" / ".lock").acquire(0)
    (tmp_path / ".lock.3").mkdir()
    with pytest.raises(IsADirectoryError):
        Lock(tmp_path / ".lock").acquire(0)


def test_lost_says_to_whom(tmp_path: Path) -> None:
    first = Lock(tmp_path / ".lock")
    first.acquire(0)
    shutil.copy(tmp_path / ".lock.1", tmp_path / ".lock.2")
    with pytest.raises(LockLost, match=f"process {os.getpid()} on"):
        first.check()
    first.release()
    assert time.strftime("%Y-") in (tmp_path / ".lock.2").read_text()
