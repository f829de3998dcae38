"""Which folders there are, and what it means that something cannot be read: only "not there" is nothing."""

import errno
import re
from pathlib import Path

from ...runtime.errors import UserError
from ...runtime.paths import content_of, is_folder


class Damaged(UserError):
    """A checkpoint that cannot be used; the message names the file."""


class Unreadable(UserError):
    """What is at a path cannot be told now: a stale handle, no permission. It is neither damaged nor absent, so a run
    neither starts anew nor goes on from an older checkpoint for it."""


def trouble(path: Path, error: OSError) -> Damaged | Unreadable:
    """What an error of reading a checkpoint means: a file that is missing, or on bad sectors, is damaged."""
    why = f"{path} cannot be read ({error.strerror or error})"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO):
        return Damaged(why)
    return Unreadable(f"{why}; mend that and run the same command again")


def checkpoints_folder(run_folder: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_folder / "checkpoints"


def folder_of(run_folder: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return checkpoints_folder(run_folder) / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def named_folders(run_folder: Path) -> list[Path]:
    """Folders that have a checkpoint's name, whole or not, oldest first.

    Raises:
        Unreadable: they cannot be listed.
    """
    folders = [path for path in _content(run_folder) if re.fullmatch(r"step-\d{8,}", path.name)]
    try:
        return sorted((folder for folder in folders if is_folder(folder)), key=step_of)
    except OSError as error:
        raise unlisted(run_folder, error) from None


def leftovers(run_folder: Path) -> list[Path]:
    """What interrupted saves and removals left; the next save sweeps it away.

    Raises:
        Unreadable: it cannot be listed.
    """
    return [path for path in _content(run_folder) if path.name.startswith("tmp-")]


def _content(run_folder: Path) -> list[Path]:
    try:
        return content_of(checkpoints_folder(run_folder))
    except OSError as error:
        raise unlisted(run_folder, error) from None


def unlisted(run_folder: Path, error: OSError) -> Unreadable:
    """What to raise where a run's checkpoints cannot be listed."""
    folder = checkpoints_folder(run_folder)
    aim = f", a link to {folder.readlink()}," if folder.is_symlink() else ""
    return Unreadable(
        f"{folder}{aim} cannot be read ({error.strerror or error}), so whether there is a checkpoint is not known; "
        "mend that and run the same command again, or write another run.dir"
    )


def check_run_folder(run_folder: Path) -> None:
    """Make sure that there is a folder.

    Raises:
        UserError: there is none, or that cannot be told.
    """
    try:
        found = is_folder(run_folder)
    except OSError as error:
        raise UserError(
            f"{run_folder} cannot be read ({error.strerror or error}); mend that, or write another"
        ) from None
    if not found:
        raise UserError(f"{run_folder} is not a run folder; write the folder of a training run")
