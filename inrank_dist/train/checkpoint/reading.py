"""Which checkpoint a reader gets: the newest whose every file is as it was written."""

import logging
from pathlib import Path

from ...runtime.context import Context
from ...runtime.errors import UserError
from .contents import Checkpoint, check_contents
from .folder import newest_sound, recover, verify
from .listing import check_run_folder, named_folders, step_of
from .state import read_state

log = logging.getLogger("inrank_dist")


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint whose files were all hashed, in this process alone.

    Raises:
        Damaged: a file is not as it was written, or what it holds does not fit together.
        Unreadable: that cannot be told.
    """
    verify(folder)
    checkpoint = Checkpoint(folder, read_state(folder))
    check_contents(checkpoint)
    return checkpoint


def find_checkpoint(run_folder: Path, step: int | None = None) -> Checkpoint:
    """The newest checkpoint that is not damaged, or that of a step.

    Raises:
        UserError: there is none, or that of the step is damaged.
    """
    check_run_folder(run_folder)
    folders = _of_step(run_folder, step)
    if step is not None:
        return open_checkpoint(folders[0])
    return newest_sound(run_folder, folders, open_checkpoint, log.warning)


def _of_step(run_folder: Path, step: int | None) -> list[Path]:
    """Folders of checkpoints; that of a step alone, if one is named, which there must be."""
    folders = named_folders(run_folder)
    chosen = [folder for folder in folders if step in (None, step_of(folder))]
    if step is not None and not chosen:
        present = ", ".join(str(step_of(folder)) for folder in folders) or "none: train it first"
        raise UserError(f"{run_folder} holds no checkpoint of step {step}; write one of {present}")
    return chosen


def peek_checkpoint(run_folder: Path, step: int | None = None) -> Checkpoint | None:
    """The newest checkpoint, or that of a step, as far as all but its tensors tell, which are only looked for; None:
    there is none at all.

    Raises:
        Damaged: there are some, and all are damaged.
        Unreadable: whether there are any, or what is in one, cannot be told.
    """
    folders = _of_step(run_folder, step)

    def peek(folder: Path) -> Checkpoint:
        verify(folder, tensors=False)
        return Checkpoint(folder, read_state(folder))

    if step is not None:
        return peek(folders[0])
    return newest_sound(run_folder, folders, peek, lambda line: None) if folders else None


def resumable(run_folder: Path, context: Context) -> Checkpoint | None:
    """The checkpoint to continue from, the same in all processes, which hash its files in shares; None: none at all.

    Raises:
        Damaged: there are some, and all are damaged.
        Unreadable: whether there are any, or what is in one, cannot be told.
    """
    context.on_rank_zero(recover, run_folder)
    folders = context.gather(context.on_rank_zero(named_folders, run_folder))[0]
    return _sound(run_folder, folders, context) if folders else None


def branch_point(run_folder: Path, step: int | None, context: Context) -> Checkpoint:
    """The newest checkpoint of another run, or that of a step, the same in all processes, which hash its files in
    shares. Nothing is changed in that run's folder.

    Raises:
        UserError: there is none, or it is damaged.
    """

    def find() -> list[Path]:
        check_run_folder(run_folder)
        return _of_step(run_folder, step)

    folders = context.gather(context.on_rank_zero(find))[0]
    return _check_together(folders[0], context) if step is not None else _sound(run_folder, folders, context)


def _sound(run_folder: Path, folders: list[Path], context: Context) -> Checkpoint:
    return newest_sound(run_folder, folders, lambda folder: _check_together(folder, context), log.warning)


def _check_together(folder: Path, context: Context) -> Checkpoint:
    """A checkpoint whose files all processes have hashed in shares.

    Raises:
        Damaged, Unreadable: in all processes.
    """

    def look() -> Checkpoint:
        verify(folder, context.rank, context.world_size)
        found = Checkpoint(folder, read_state(folder))
        if context.is_main:
            check_contents(found)
        return found

    return context.on_all_ranks(look)
