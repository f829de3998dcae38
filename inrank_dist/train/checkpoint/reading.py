"""Selects the checkpoint to read: the newest one whose files are all unchanged."""

import logging
from pathlib import Path

from ...runtime.context import Context
from ...runtime.errors import UserError
from .contents import Checkpoint, check_contents
from .folder import newest_valid, recover, verify
from .listing import check_run_folder, named_folders, step_of
from .state import read_state

log = logging.getLogger("inrank_dist")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint after hashing all its files, in this process alone.

    Raises:
        Damaged: a file has changed, or the contents are inconsistent.
        Unreadable: a file cannot be read.
    """
    verify(folder)
    checkpoint = Checkpoint(folder, read_state(folder))
    check_contents(checkpoint)
    return checkpoint


def find_checkpoint(run_folder: Path, step: int | None = None) -> Checkpoint:
    """Find the newest checkpoint that is not damaged, or the one of a given step.

    Raises:
        UserError: there is none, or the one of the given step is damaged.
    """
    check_run_folder(run_folder)
    folders = _of_step(run_folder, step)
    if step is not None:
        return open_checkpoint(folders[0])
    return newest_valid(run_folder, folders, open_checkpoint, log.warning)


def _of_step(run_folder: Path, step: int | None) -> list[Path]:
    """Checkpoint folders; if a step is given, only the folder of that step, which must exist."""
    folders = named_folders(run_folder)
    chosen = [folder for folder in folders if step in (None, step_of(folder))]
    if step is not None and not chosen:
        present = ", ".join(str(step_of(folder)) for folder in folders) or "none: train it first"
        raise UserError(f"{run_folder} holds no checkpoint of step {step}; write one of {present}")
    return chosen


def peek_checkpoint(run_folder: Path, step: int | None = None) -> Checkpoint | None:
    """Open the newest checkpoint, or the one of a given step, without hashing its tensors; None if there is none.

    Raises:
        Damaged: there are some, and all are damaged.
        Unreadable: the folders or a file cannot be read.
    """
    folders = _of_step(run_folder, step)

    def peek(folder: Path) -> Checkpoint:
        verify(folder, tensors=False)
        return Checkpoint(folder, read_state(folder))

    if step is not None:
        return peek(folders[0])
    return newest_valid(run_folder, folders, peek, lambda line: None) if folders else None


def resumable(run_folder: Path, context: Context) -> Checkpoint | None:
    """The checkpoint to resume from, the same in all processes, which share the hashing; None if there is none.

    Raises:
        Damaged: there are some, and all are damaged.
        Unreadable: the folders or a file cannot be read.
    """
    context.on_rank_zero(recover, run_folder)
    folders = context.gather(context.on_rank_zero(named_folders, run_folder))[0]
    return _newest_valid(run_folder, folders, context) if folders else None


def branch_point(run_folder: Path, step: int | None, context: Context) -> Checkpoint:
    """The newest checkpoint of another run, or the one of a given step, the same in all processes, which share the
    hashing. Does not modify that run's folder.

    Raises:
        UserError: there is none, or it is damaged.
    """

    def find() -> list[Path]:
        check_run_folder(run_folder)
        return _of_step(run_folder, step)

    folders = context.gather(context.on_rank_zero(find))[0]
    if step is not None:
        return _check_on_all_ranks(folders[0], context)
    return _newest_valid(run_folder, folders, context)


def _newest_valid(run_folder: Path, folders: list[Path], context: Context) -> Checkpoint:
    return newest_valid(run_folder, folders, lambda folder: _check_on_all_ranks(folder, context), log.warning)


def _check_on_all_ranks(folder: Path, context: Context) -> Checkpoint:
    """Open a checkpoint after all processes have hashed their share of its files.

    Raises:
        Damaged, Unreadable: on all processes.
    """

    def check() -> Checkpoint:
        verify(folder, context.rank, context.world_size)
        found = Checkpoint(folder, read_state(folder))
        if context.is_main:
            check_contents(found)
        return found

    return context.on_all_ranks(check)
