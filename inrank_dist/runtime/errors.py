"""Errors that are told in one line."""

EXIT_MISTAKE = 2
"""Exit status of a ``UserError``, which the process has told in a line."""


class UserError(ValueError):
    """A mistake in a setting, a file or the environment, told in one line.

    The text names the value that is wrong and says what to write instead. The command line prints it as
    ``error: <text>`` and exits with status 2, without a traceback.
    """


class Lost(RuntimeError):
    """Another process or node did not come or has gone. One line as well, but exit status 1: another start may do."""


def error_line(output: str) -> str:
    """The line with which a command that failed says why: the last that begins ``error:``, or else the last."""
    lines = [line for line in output.splitlines() if line.strip()]
    return ([line for line in lines if line.startswith("error: ")] or lines or [""])[-1]
