"""Expands ``~`` in paths that users write."""

import argparse
import os
from pathlib import Path

from .errors import UserError


def expand_home(path: str | Path, setting: str) -> Path:
    """Replace a leading ``~`` or ``~user`` by that home folder.

    Args:
        setting: name of the setting, for the error message.

    Raises:
        UserError: the home folder is unknown.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{setting} is {str(path)!r}, and nothing says where that home folder is (no HOME, no entry in passwd); "
            "write a path without ~"
        ) from None


def searched(path: str | Path) -> str:
    """Where a path that was not found was looked for, in parentheses after it: nothing if it is absolute."""
    absolute = os.path.abspath(os.path.expanduser(path))
    return "" if absolute == str(path) else f" ({absolute})"


def path_argument(text: str) -> Path:
    """A path on the command line. Shells do not expand ``--run=~/folder``."""
    try:
        return Path(text) if os.path.lexists(text) else expand_home(text, "the path")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
