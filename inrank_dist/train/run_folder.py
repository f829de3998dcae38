"""The run folder: one job at a time in it, and nothing written before there is nothing left to complain of."""

import logging
import os
from pathlib import Path
from typing import Any

from ..config import Config
from ..runtime.errors import UserError
from ..runtime.files import write_atomically
from ..runtime.lock import Lock, LockHeld, LockLost
from .checkpoint import Checkpoint, named_folders
from .monitors import ConsoleMonitor, JsonlMonitor, Monitors, TensorBoardMonitor

log = logging.getLogger("inrank_dist")

LOCK, METRICS = ".lock", "metrics.jsonl"

WAIT_SECONDS = 10.0
"""How long to wait for a job that is just leaving the folder."""


class RunFolder:
    """A run folder and the lock on it, which process 0 holds and the others never ask for.

    It is the first of the monitors, so that no record goes into a folder that another job has taken over.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._lock = folder, Lock(folder / LOCK)

    def take_if_present(self) -> None:
        """Lock a folder that exists, before its checkpoints are looked at; one that does not holds none.

        Raises:
            UserError: another job is in it, or it cannot be read or written.
        """
        try:
            self.folder.stat()
            self._take()
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unusable(self.folder, error) from None

    def open(self, config: Config, checkpoint: Checkpoint | None) -> Monitors:
        """Make the folder, unless it exists, and open the files of a run that goes on from ``checkpoint``.

        Raises:
            UserError: another job is, or was meanwhile, in it, or it cannot be written.
        """
        folder, state = self.folder, checkpoint.state if checkpoint else None
        step = state.step if state else 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not self._lock.held:
                self._take()
                if named_folders(folder):
                    raise UserError(
                        f"run.dir is {folder}, in which another job has trained meanwhile; run the same command again "
                        "to go on from its checkpoint, or write another run.dir"
                    )
            (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            if checkpoint and not checkpoint.is_in(folder):
                _copy_history(checkpoint.run_folder / METRICS, folder / METRICS)
            metrics = JsonlMonitor(folder / METRICS)
            metrics.truncate_after(step, evaluation_due=state is not None and state.evaluation_due)
            curves = TensorBoardMonitor(folder / "tensorboard", purge_step=step + 1)
        except OSError as error:
            raise _unusable(folder, error) from None
        return Monitors([self, metrics, curves, ConsoleMonitor(config.train.steps)])

    def check(self) -> None:
        """Make sure that the folder is still this job's.

        Raises:
            UserError: another job took it over, since this one was silent for too long.
        """
        try:
            self._lock.check()
        except LockLost as lost:
            raise UserError(
                f"run.dir {self.folder} was taken over by {lost.owner or 'another job'} while this job showed no "
                "heartbeat (stopped, or cut off from the file system); go on with that one, or write another run.dir"
            ) from None
        except OSError as error:
            raise _unusable(self.folder, error) from None

    def write(self, record: dict[str, Any]) -> None:
        """As a monitor: check the lock before the others write."""
        self.check()

    def close(self) -> None:
        """As a monitor: nothing; the folder is this job's until ``release``."""

    def release(self) -> None:
        """Give the folder back, if it was taken."""
        self._lock.release()

    def _take(self) -> None:
        def on_wait(held: LockHeld) -> None:
            log.info("run.dir %s is in use by %s: waiting for its end", self.folder, held.owner or "another job")

        try:
            self._lock.acquire(WAIT_SECONDS, on_wait)
        except LockHeld as held:
            raise UserError(
                f"run.dir {self.folder} is in use by {held.owner or 'another job'}; wait for that job or stop it, or "
                "write another run.dir"
            ) from None


def refuse_unwritable(folder: Path) -> None:
    """Find out whether a run folder can be made and written, before the data is prepared; nothing is made yet.

    Raises:
        UserError: it cannot.
    """
    present = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not present.is_dir():
        raise UserError(f"run.dir is {folder}, but {present} is not a folder; write a folder that can be written")
    if not os.access(present, os.W_OK | os.X_OK):
        raise UserError(f"run.dir is {folder}, and {present} cannot be written; write a folder that can")


def _copy_history(source: Path, target: Path) -> None:
    """The records of the run that this one branches off, if it has any; those after the branch are cut later."""
    try:
        records = source.read_bytes()
    except FileNotFoundError:
        return
    write_atomically(target, records)


def _unusable(folder: Path, error: OSError) -> UserError:
    return UserError(f"run.dir {folder} cannot be used ({error.strerror or error}); write a folder that can be written")
