import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests start more processes than a machine has GPUs
os.environ["INRANK_PROGRESS"] = "off"  # what a command prints must not depend on how long it took

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helpers beside the tests, for the workers of the pool as well
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)

from browser import Browser  # noqa: E402
from pool import Pool  # noqa: E402
from runs import Fails, the_error  # noqa: E402
from sharing import Machine, locked, put_into_groups, scheduler, shared_folder, write_groups  # noqa: E402

from inrank_dist.bench.parity import write_corpus  # noqa: E402
from inrank_dist.commands.main import main  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def progress_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show progress, also in processes that the test starts."""
    monkeypatch.delenv("INRANK_PROGRESS")


def pytest_configure(config: pytest.Config) -> None:
    """DeepSpeed builds its kernels in a folder of this run: a lock that a killed build left elsewhere blocks nobody."""
    if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers inherit it
        folder = tempfile.mkdtemp(prefix="inrank-extensions-")
        os.environ["TORCH_EXTENSIONS_DIR"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests run below nohup, their processes would ignore it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    put_into_groups(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """pytest-xdist 3.8 does not see the groups with pytest 9.2, which no longer reads the names that it changes."""
    folder = shared_folder(config._tmp_path_factory.getbasetemp())  # type: ignore[attr-defined]
    return scheduler(config, log, folder) if config.getoption("dist") == "loadgroup" else None


@pytest.hookimpl(tryfirst=True)  # pytest-xdist's own hook tells the controller, which then reads the groups
def pytest_collection_finish(session: pytest.Session) -> None:
    """The second part is as the train command does: else each rank event searches all that was imported for cycles."""
    write_groups(session.items, shared_folder(session.config._tmp_path_factory.getbasetemp()))  # type: ignore[attr-defined]
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test marked ``serial`` has the machine for itself. Waiting for it does not count for the test's time limit."""
    folder = shared_folder(item.config._tmp_path_factory.getbasetemp())  # type: ignore[attr-defined]
    with Machine(folder).taken(alone=item.get_closest_marker("serial") is not None):
        return (yield)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Worker processes, shared by all tests."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium."""
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small corpus and the cache of its prepared data, shared by all tests."""
    folder = shared_folder(tmp_path_factory.getbasetemp()) / "small"
    with locked(folder.with_suffix(".lock")):
        if not folder.exists():
            write_corpus(folder / "corpus")
    return folder


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must fail; its error."""

    def run(*words: object) -> str:
        capsys.readouterr()
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert out == ""
        return the_error(status, err)

    return run
