"""Errors that are reported in one line."""

import difflib
from collections.abc import Iterable

EXIT_MISTAKE = 2
"""Exit status for a ``UserError``, which the process has reported in one line."""


class UserError(ValueError):
    """A mistake in a setting, a file or the environment, reported in one line.

    The text names the value that is wrong and says what to write instead. The command line prints it as
    ``error: <text>`` and exits with status 2, without a traceback.
    """


class JobFailed(RuntimeError):
    """A failure that is not the user's mistake, such as a node that did not join or was lost.

    Reported in one line like a ``UserError``, but with exit status 1: starting again may work.
    """


def error_line(output: str) -> str:
    """The line in which a failed command gives the reason: the last one that begins ``error:``, else the last one."""
    lines = [line for line in output.splitlines() if line.strip()]
    return ([line for line in lines if line.startswith("error: ")] or lines or [""])[-1]


def install(extra: str) -> str:
    """Return what to write to install the libraries of an optional extra, such as ``hf``."""
    return f"write pip install -e '.[{extra}]' in the checkout"


def nearest(name: str, known: Iterable[str]) -> str:
    """What a message on an unknown name ends with: the known name that is closest, or all of them if they are few."""
    known = list(known)
    close = known if len(known) == 1 else difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known are {', '.join(known)}" if len(known) < 20 else "; --help lists all"
