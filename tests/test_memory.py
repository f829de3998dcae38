"""Peak memory of a process."""

import subprocess
import sys

import pytest

STARTED_BY_A_LARGE_ONE = """
import subprocess, sys
held = b"x" * (2 << 30)
program = "from inrank_dist.train.memory import peak_resident_bytes as peak; print(peak())"
print(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.slow
def test_the_peak_is_that_of_this_process_alone() -> None:
    """A process that was started by one of 2 GiB has not held so much itself."""
    done = subprocess.run([sys.executable, "-c", STARTED_BY_A_LARGE_ONE], capture_output=True, text=True, timeout=120)
    assert 50 << 20 < int(done.stdout) < 1 << 30, done.stderr
