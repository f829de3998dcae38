"""Errors that are the user's to mend."""


class UserError(ValueError):
    """A mistake in a setting, a file or the environment, told in one line.

    The text names the value that is wrong and says what to write instead. The command line prints it as
    ``error: <text>`` and exits with status 2, without a traceback.
    """
