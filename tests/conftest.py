import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests start more processes than a machine has GPUs

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helpers beside the tests, for the workers of the pool as well
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)

from pool import Pool  # noqa: E402
from runs import Fails, the_error, write_corpus  # noqa: E402

from inrank_dist.commands.main import main  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Worker processes, shared by all tests."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small corpus and the cache of its prepared data, shared by all tests."""
    folder = tmp_path_factory.mktemp("small")
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
