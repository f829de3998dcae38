"""Paths below a home folder, as users write them."""

import argparse
import os
from pathlib import Path

from .errors import UserError


def expand_home(path: str | Path, setting: str) -> Path:
    """``path`` with a ``~`` or ``~user`` at its start replaced by that home folder.

    Args:
        setting: what gave the path, for the error.

    Raises:
        UserError: nothing says where that home folder is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{setting} is {str(path)!r}, and nothing says where that home folder is (no HOME, no entry in passwd); "
            "write a path without ~"
        ) from None


def path_argument(text: str) -> Path:
    """A path on the command line; shells leave ``--run=~/folder`` as it is."""
    try:
        return Path(text) if os.path.lexists(text) else expand_home(text, "the path")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
