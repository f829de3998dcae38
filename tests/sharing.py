"""What the processes of one test run share: things that are made once, and the machine when a test measures it."""

import fcntl
import functools
import json
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest


def slow(*values: object) -> Any:
    """A case of ``parametrize`` that only CI runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def nightly(*values: object) -> Any:
    """A case of ``parametrize`` that is left to the night."""
    return pytest.param(*values, marks=pytest.mark.nightly)


def shared_folder(basetemp: Path) -> Path:
    """One folder a test run: each worker of pytest-xdist has a folder of its own below it."""
    return basetemp.parent if "PYTEST_XDIST_WORKER" in os.environ else basetemp


@contextmanager
def locked(file: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock between processes; a process that dies gives it back."""
    with file.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing would not do where a process forked meanwhile has it open


def made_once(folder: Path, name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returns; only the first process that asks for ``name`` calls it, the others read its pickle."""
    file = folder / f"{name}.pickle"
    with locked(folder / f"{name}.lock"):
        if not file.exists():
            value = make()
            file.with_suffix(".tmp").write_bytes(pickle.dumps(value))
            file.with_suffix(".tmp").rename(file)
        return pickle.loads(file.read_bytes())


class Machine:
    """Tests side by side, except that one marked ``serial`` waits until the others have ended and runs alone."""

    def __init__(self, folder: Path) -> None:
        self._queue, self._running = folder / "queue.lock", folder / "running.lock"

    @contextmanager
    def taken(self, *, alone: bool) -> Iterator[None]:
        with ExitStack() as stack:
            # Who comes later queues behind a test that waits for the machine, else that one would wait for ever.
            with locked(self._queue):
                stack.enter_context(locked(self._running, shared=not alone))
            yield


def put_into_groups(items: list[pytest.Item]) -> None:
    """Say which tests run in one worker of pytest-xdist (``--dist loadgroup``), in order.

    Those of clusters, which change the machine's network and mostly wait; those of the pool, so that its processes
    start once and two cores do not run eight of them; else those of a module that share a fixture, so that it is made
    once. A mark in the module comes first. The rest goes wherever there is room.
    """
    for item in items:
        if item.get_closest_marker("xdist_group"):
            continue
        definitions = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
        if item.get_closest_marker("cluster"):
            group = "cluster"
        elif "pool" in definitions:
            group = "pool"
        elif any(definition[-1].scope == "module" for definition in definitions.values()):
            group = Path(item.location[0]).stem
        else:
            continue
        item.add_marker(pytest.mark.xdist_group(group))


def group_of(item: pytest.Item) -> str:
    """The group of a test; one without a group is one by itself."""
    mark = item.get_closest_marker("xdist_group")
    return str(mark.args[0]) if mark else item.nodeid


def write_groups(items: list[pytest.Item], folder: Path) -> None:
    """Leave the groups where ``scheduler`` finds them; each worker collects the same."""
    temporary = folder / f"groups-{os.getpid()}"
    temporary.write_text(json.dumps({item.nodeid: group_of(item) for item in items}))
    temporary.rename(folder / "groups.json")


def scheduler(config: pytest.Config, log: Any, folder: Path) -> Any:
    """What divides tests among the workers of pytest-xdist: a group stays together, the largest begins."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            nodeid = nodeid.partition("@")[0] if nodeid not in self._known else nodeid
            return self._known.get(nodeid, nodeid)

        @functools.cached_property
        def _known(self) -> dict[str, str]:
            """Read when the workers have collected."""
            return dict(json.loads((folder / "groups.json").read_text()))

    return Groups(config, log)
