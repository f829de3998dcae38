"""Lists checkpoint folders, and distinguishes missing, damaged and unreadable ones."""

import errno
import re
from pathlib import Path

from ...runtime.errors import UserError
from ...runtime.paths import content_of, is_folder


class Damaged(UserError):
    """A checkpoint that cannot be used; the message names the file."""


class Unreadable(UserError):
    """The content of a path cannot be determined now, because of a stale handle or missing permission. It is neither
    damaged nor absent, so a run must neither start over nor resume from an older checkpoint because of it."""


def read_error(path: Path, error: OSError) -> Damaged | Unreadable:
    """Classify an error while reading a checkpoint. A missing file, or one on bad sectors, counts as damaged."""
    why = f"{path} cannot be read ({error.strerror or error})"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO):
        return Damaged(why)
    return Unreadable(f"{why}; fix that and run the same command again")


def checkpoints_folder(run_folder: Path) -> Path:
    """The folder for a run's checkpoints."""
    return run_folder / "checkpoints"


def folder_of(run_folder: Path, step: int) -> Path:
    """The folder for a step's checkpoint."""
    return checkpoints_folder(run_folder) / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))


def named_folders(run_folder: Path) -> list[Path]:
    """Folders with the name of a checkpoint, complete or not, oldest first.

    Raises:
        Unreadable: the folders cannot be listed.
    """
    folders = [path for path in _content(run_folder) if re.fullmatch(r"step-\d{8,}", path.name)]
    try:
        return sorted((folder for folder in folders if is_folder(folder)), key=step_of)
    except OSError as error:
        raise listing_error(run_folder, error) from None


def leftovers(run_folder: Path) -> list[Path]:
    """What interrupted saves and removals left behind. The next save deletes it.

    Raises:
        Unreadable: the folder cannot be listed.
    """
    return [path for path in _content(run_folder) if path.name.startswith("tmp-")]


def _content(run_folder: Path) -> list[Path]:
    try:
        return content_of(checkpoints_folder(run_folder))
    except OSError as error:
        raise listing_error(run_folder, error) from None


def listing_error(run_folder: Path, error: OSError) -> Unreadable:
    """The error to raise if a run's checkpoints cannot be listed."""
    folder = checkpoints_folder(run_folder)
    target = f", a link to {folder.readlink()}," if folder.is_symlink() else ""
    return Unreadable(
        f"{folder}{target} cannot be read ({error.strerror or error}), so whether there is a checkpoint is not known; "
        "fix that and run the same command again, or write another run.dir"
    )


def check_run_folder(run_folder: Path) -> None:
    """Check that the folder exists.

    Raises:
        UserError: it does not, or that cannot be determined.
    """
    try:
        found = is_folder(run_folder)
    except OSError as error:
        raise UserError(
            f"{run_folder} cannot be read ({error.strerror or error}); fix that, or write another"
        ) from None
    if not found:
        raise UserError(f"{run_folder} is not a run folder; write the folder of a training run")
