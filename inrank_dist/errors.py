"""Errors that are told in one line."""


class UserError(ValueError):
    """A mistake in a setting, a file or the environment, told in one line.

    The text names the value that is wrong and says what to write instead. The command line prints it as
    ``error: <text>`` and exits with status 2, without a traceback.
    """


class Lost(RuntimeError):
    """Another process or node did not come or has gone. One line as well, but exit status 1: another start may do."""
