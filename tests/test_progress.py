"""Progress of long work, on a terminal and in a file."""

import logging
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from inrank_dist.runtime import progress
from inrank_dist.runtime.progress import counted, phase

pytestmark = pytest.mark.usefixtures("progress_is_on")

WORK = """
import logging, sys, time
from inrank_dist.runtime import progress
from inrank_dist.runtime.progress import CurrentStderrHandler, counted, end_bars, phase, terminal_holders

logging.basicConfig(format="%(message)s", level=logging.INFO, handlers=[CurrentStderrHandler()])
progress.PATIENCE_S = float(sys.argv[1])
progress._Bar.interval = progress._Lines.interval = 0.05
def long_enough():
    time.sleep(0.3)
{}
print("the result")
"""


def on_terminal(body: str, *words: str) -> str:
    """Run ``body`` on a terminal of 120 columns and return what it shows."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "140", "LINES": "40"}
    command = [sys.executable, "-c", WORK.format(body), *words]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                received = os.read(ours, 1 << 16)
            except OSError:  # the last process has closed it
                break
            shown += received
        assert process.wait(60) == 0, shown.decode()
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())


def in_file(body: str, folder: Path, *words: str) -> list[str]:
    """The lines of standard error where it is a file."""
    with (folder / "log").open("wb") as log:
        command = [sys.executable, "-c", WORK.format(body), *words]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=log, check=True, timeout=60)
    return (folder / "log").read_text().splitlines()


COUNTED = """
for each in counted(range(4), "measuring [red]layers[/red]", unit="layers"):
    long_enough()
    if each == 1:
        logging.warning("warning: in between")
"""


def test_a_terminal_shows_a_bar_and_lines_above_it() -> None:
    shown = on_terminal(COUNTED, "0.1")
    assert "measuring [red]layers[/red]" in shown, "names are no markup"
    assert "2 of 4 layers" in shown and "50%" in shown and "100%" in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "warning: in between" in [line.split("\r")[-1].strip() for line in plain.replace("\r\n", "\n").split("\n")]
    assert shown.rstrip().endswith("the result")


def test_a_file_has_a_line_now_and_then(tmp_path: Path) -> None:
    lines = in_file(COUNTED, tmp_path, "0.1")
    assert lines[0] == "measuring [red]layers[/red] ..."
    assert any(re.fullmatch(r"measuring .*: 50% after \d s, about \d s left", line) for line in lines)
    assert re.fullmatch(r"measuring .*: done in \d\.\d s", lines[-1])
    assert "warning: in between" in lines and "\x1b" not in "".join(lines)


QUICK = """
with phase("hashing", 3, unit="bytes") as advance:
    advance(3)
"""


def test_quick_work_shows_nothing(tmp_path: Path) -> None:
    assert in_file(QUICK, tmp_path, "2") == []
    assert on_terminal(QUICK, "2").strip() == "the result"


def test_work_that_cannot_count_is_seen(tmp_path: Path) -> None:
    """An SVD or a collective calls nobody back."""
    body = 'with phase("waiting for the other processes"):\n    long_enough()'
    assert any("waiting for the other processes: after" in line for line in in_file(body, tmp_path, "0.1"))
    assert "waiting for the other processes" in on_terminal(body, "0.1")


NESTED = """
with phase("the study", 2, unit="runs") as outer:
    with phase("reading", 4e6, unit="bytes") as advance:
        advance(4e6)
        long_enough()
    outer(1)
    long_enough()
"""


def test_bars_of_nested_work_do_not_disturb_each_other(tmp_path: Path) -> None:
    shown = on_terminal(NESTED, "0.1")
    assert "the study" in shown and "reading" in shown and "MB/s" in shown and "1 of 2 runs" in shown
    lines = in_file(NESTED, tmp_path, "0.1")
    assert any(re.fullmatch(r"reading: done in \d\.\d s \(\d+\.\d MB/s\)", line) for line in lines)


def test_lines_while_something_else_holds_the_terminal() -> None:
    """A training shows its own bar."""
    shown = on_terminal(f"terminal_holders.add(1)\n{COUNTED}", "0.1")
    assert "about" in shown and "━" not in shown


def test_an_error_ends_a_bar_and_is_not_reported_as_done(tmp_path: Path) -> None:
    body = 'try:\n    with phase("hashing", 10) as advance:\n        long_enough()\n        raise KeyError\n'
    body += "except KeyError:\n    pass"
    assert not any("done" in line for line in in_file(body, tmp_path, "0.1"))
    assert "100%" not in on_terminal(body, "0.1")


def test_other_processes_of_a_job_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "inrank_dist")
    with phase("hashing", 10, enabled=False, patience=0) as advance:
        advance(10)
    assert list(counted([1, 2], "x", enabled=False)) == [1, 2] and not caplog.messages


def test_it_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INRANK_PROGRESS", "off")
    assert in_file(COUNTED, tmp_path, "0") == ["warning: in between"]
    assert "layers" not in on_terminal(COUNTED, "0")


def test_an_error_gives_the_terminal_back() -> None:
    """Also where a loop over ``counted`` was left, whose traceback keeps it alive."""
    body = (
        "try:\n    for each in counted(range(2), 'measuring'):\n        long_enough()\n        raise KeyError\n"
        "except KeyError as error:\n    kept = error\n    end_bars()\n    print('an error')"
    )
    shown = on_terminal(body, "0.1")
    hidden, visible = "\x1b[?25l", "\x1b[?25h"
    assert shown.count(hidden) == shown.count(visible) == 1
    assert shown.index(visible) < shown.index("an error")


def test_many_threads_may_count(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "inrank_dist")
    with phase("hashing", unit="bytes", patience=0) as work:
        threads = [threading.Thread(target=lambda: [work(1) for _ in range(1000)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert work.done == 8000
    assert caplog.messages[0] == "hashing ..." and caplog.messages[-1].startswith("hashing: done in")


def test_the_estimate_is_of_the_current_activity() -> None:
    work = progress.Work("theory", None, "")
    work._since -= 100
    work.report("theory: width 10", 0, 100)
    time.sleep(0.01)
    work.report("theory: width 10", 50, 100)
    assert work.left is not None and work.left < 50


def test_what_ends_is_the_whole(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "inrank_dist")
    with phase("theory", patience=0) as work:
        work.report("theory: width 10", 1, 2)
    assert caplog.messages[-1].startswith("theory: done in")
