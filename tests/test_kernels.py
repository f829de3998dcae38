"""Builds of DeepSpeed's kernels that are killed, with a real compiler."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_tools import ROOT, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BUILD = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from inrank_dist.engine.kernels import use_own_builds
use_own_builds()
from torch.utils.cpp_extension import load
load("small", [sys.argv[1]], is_python_module=False)
print("built")
"""

COMPILER = """#!/bin/sh
if [ ! -e {folder}/go ]; then
    case "$*" in *small.cpp*)
        # Killing the build does not kill the compiler, which has a process group of its own.
        echo half >small.o; touch {folder}/started; until [ -e {folder}/end ]; do sleep 0.2; done; exit 1 ;;
    esac
fi
exec c++ "$@"
"""


def test_a_build_that_was_killed_is_built_again_and_one_that_lives_is_waited_for(tmp_path: Path) -> None:
    """torch's own lock would have both who come later wait for ever."""
    (tmp_path / "small.cpp").write_text("int answer() { return 42; }\n")
    (tmp_path / "compiler").write_text(COMPILER.format(folder=tmp_path))
    (tmp_path / "compiler").chmod(0o755)
    environment = os.environ | {
        "CXX": str(tmp_path / "compiler"),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "PYTHONPATH": str(ROOT),
    }

    def build(name: str) -> "subprocess.Popen[bytes]":
        with (tmp_path / name).open("w") as output:
            return subprocess.Popen(
                [sys.executable, "-u", "-c", BUILD, str(tmp_path / "small.cpp")],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def said(name: str) -> str:
        return (tmp_path / name).read_text()

    first = build("first")
    builds = [first]
    try:
        wait_until((tmp_path / "started").exists, 100, lambda: said("first"))
        builds.append(second := build("second"))
        wait_until(lambda: f"waiting for process {first.pid} on " in said("second"), 100, lambda: said("second"))
        assert second.poll() is None
        (tmp_path / "go").touch()
        os.killpg(first.pid, signal.SIGKILL)
        assert second.wait(100) == 0, said("second")
    finally:
        (tmp_path / "end").touch()
        for each in builds:
            if each.poll() is None:
                os.killpg(each.pid, signal.SIGKILL)
            each.wait()
    (line,) = [line for line in said("second").splitlines() if line.startswith("warning:")]
    assert f"process {first.pid} on " in line
    assert "was killed while it built " in line and line.endswith("/small; building it again")
    assert said("second").endswith("built\n")
    (folder,) = (tmp_path / "extensions").iterdir()
    assert folder.name.startswith("inrank-")
