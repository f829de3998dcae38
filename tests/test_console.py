"""What becomes of a process whose console goes away, in real processes with real pipes and terminals."""

import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import the_error

ROOT = Path(__file__).parent.parent

WORK = """
import logging, subprocess, sys
from pathlib import Path
from inrank_dist.runtime.errors import UserError
from inrank_dist.runtime import console

console.guard(outlive=sys.argv[1] == "outlive")
logging.basicConfig(format="%(message)s")
if "wait" in sys.argv:
    sys.stdin.readline()  # until the test has taken the console away
try:
    for number in range(2000):
        print(f"line {number}")
    sys.stdout.flush()
    logging.getLogger().warning("logged")
    subprocess.run([sys.executable, "-c", "print('from a child', flush=True)"], check="full" not in sys.argv)
except UserError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
Path(sys.argv[2]).write_text("done")
"""
LINES = "".join(f"line {number}\n" for number in range(2000))


def start(mode: str, done: Path, *words: str, **options: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WORK, mode, str(done), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, text=True, **({"stderr": subprocess.PIPE, "env": environment} | options))


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_long_work_outlives_the_reader_of_its_output(tmp_path: Path, unbuffered: str) -> None:
    """``| head -1``: one line on what is left of the console, and the work is done; child processes too."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    process = start("outlive", tmp_path / "done", stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    assert (tmp_path / "done").read_text() == "done"
    assert said == (f"standard output is closed (Broken pipe); process {process.pid} continues without it\nlogged\n")


def test_a_short_command_ends_as_unix_tools_do(tmp_path: Path) -> None:
    process = start("end", tmp_path / "done", stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (-signal.SIGPIPE, "")
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("mode", ["outlive", "end"])
def test_a_closed_terminal(tmp_path: Path, mode: str) -> None:
    """Writes to it fail with EIO. The process has the terminal for both streams, and got no signal, as after setsid."""
    ours, theirs = pty.openpty()
    terminal = {"stdout": theirs, "stderr": theirs, "stdin": subprocess.PIPE, "start_new_session": True}
    process = start(mode, tmp_path / "done", "wait", **terminal)
    os.close(theirs)
    os.close(ours)
    process.communicate("go\n", timeout=30)
    assert process.returncode == (0 if mode == "outlive" else -signal.SIGPIPE)
    assert (tmp_path / "done").exists() == (mode == "outlive")


@pytest.mark.parametrize("mode", ["outlive", "end"])
def test_a_full_disk(tmp_path: Path, mode: str) -> None:
    """Long work has its product elsewhere; a command whose product is lost says so."""
    with open("/dev/full", "w") as full:
        process = start(mode, tmp_path / "done", "full", stdout=full)
        _, said = process.communicate(timeout=30)
    if mode == "outlive":
        assert process.returncode == 0, said
        assert (tmp_path / "done").exists()
    else:
        assert the_error(process.returncode, said) == (
            "standard output cannot be written (No space left on device); write it to another place"
        )


def test_what_is_printed_goes_into_no_file_when_the_console_was_closed_from_the_start(tmp_path: Path) -> None:
    """``>&- 2>&-``: the first file that is opened would become standard output."""
    words = [sys.executable, "-c", WORK, "outlive", tmp_path / "done"]
    process = subprocess.run(
        ["sh", "-c", 'exec "$@" >&- 2>&- <&-', "sh", *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=30,
    )
    assert process.returncode == 0
    assert (tmp_path / "done").read_text() == "done"


def test_a_reader_that_is_slow_and_a_pipe_that_does_not_block(tmp_path: Path) -> None:
    """Programs that share a terminal or pipe may set it to non-blocking, which Python's own streams do not survive."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    process = start("outlive", tmp_path / "done", stdout=writes)
    os.close(writes)
    select.select([reads], [], [], 30)
    with open(reads) as pipe:
        seen = pipe.read()
    assert process.wait(30) == 0
    assert seen == LINES + "from a child\n"
