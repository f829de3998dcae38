"""What the tests themselves stand on: made once a test run, and alone on the machine when asked for."""

import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from sharing import Machine, group_of, made_once, put_into_groups, scheduler, write_groups

CONTEXT = multiprocessing.get_context("fork")


def _makes(folder: Path, barrier: Barrier, index: int) -> None:
    barrier.wait()

    def make() -> int:
        (folder / f"made by {index}").touch()
        return index

    (folder / f"got {made_once(folder, 'it', make)} by {index}").touch()


def test_one_process_makes_it_and_all_get_it(tmp_path: Path) -> None:
    barrier = CONTEXT.Barrier(4)
    processes = [CONTEXT.Process(target=_makes, args=(tmp_path, barrier, index)) for index in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    (maker,) = [path.name.split()[-1] for path in tmp_path.glob("made by *")]
    assert {path.name for path in tmp_path.glob("got *")} == {f"got {maker} by {index}" for index in range(4)}


def _runs(folder: Path, alone: bool) -> None:
    with Machine(folder).taken(alone=alone):
        (folder / "inside").touch()
        while not (folder / "leave").exists():
            pass


def test_a_serial_test_waits_for_the_others_and_they_for_it(tmp_path: Path) -> None:
    """Two that are not run side by side; one that is waits for them, and who comes later queues behind it."""
    first = CONTEXT.Process(target=_runs, args=(tmp_path, False))
    first.start()
    while not (tmp_path / "inside").exists():
        pass
    with Machine(tmp_path).taken(alone=False):
        (tmp_path / "leave").touch()
        first.join(60)
        assert first.exitcode == 0, "two ordinary tests run side by side"
        (tmp_path / "leave").unlink()
        (tmp_path / "inside").unlink()
        serial = CONTEXT.Process(target=_runs, args=(tmp_path, True))
        serial.start()
        serial.join(0.3)
        assert serial.is_alive() and not (tmp_path / "inside").exists()
    while not (tmp_path / "inside").exists():
        pass
    later = CONTEXT.Process(target=_runs, args=(tmp_path, False))
    (tmp_path / "inside").unlink()
    later.start()
    later.join(0.3)
    assert later.is_alive() and not (tmp_path / "inside").exists()
    (tmp_path / "leave").touch()
    for process in (serial, later):
        process.join(60)
        assert process.exitcode == 0


def test_tests_that_share_something_share_a_worker(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """As collected here: those of the pool together, those of a module's fixture together, this one anywhere; and so
    does the scheduler see it."""
    put_into_groups(request.session.items)
    write_groups(request.session.items, tmp_path)
    seen = scheduler(_Workers(), None, tmp_path)._split_scope
    for item in request.session.items:
        if "pool" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("cluster"):
            assert seen(item.nodeid) == group_of(item) != item.nodeid
    assert seen(request.node.nodeid) == request.node.nodeid


class _Workers:
    """What the scheduler asks of the settings when it begins."""

    def getvalue(self, name: str) -> list[str]:
        return ["2*popen"]
