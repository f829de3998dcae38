"""The run folder, which one job at a time can use. It is created only after all checks have passed."""

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
from .trackers.processes import RunTrackers

log = logging.getLogger("inrank_dist")

LOCK, METRICS = ".lock", "metrics.jsonl"

WAIT_SECONDS = 10.0
"""How long to wait for a job that is about to release the folder."""


class RunFolder:
    """A run folder and its lock, which only process 0 acquires.

    It is also the first monitor and checks the lock, so that no record is written after another job has taken over the
    folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._lock = folder, Lock(folder / LOCK)

    def take_if_present(self) -> None:
        """Lock the folder if it exists. This must happen before its checkpoints are read.

        Raises:
            UserError: if another job uses the folder, or it cannot be read or written.
        """
        try:
            self.folder.stat()
            self._take()
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unusable(self.folder, error) from None

    def open(self, config: Config, checkpoint: Checkpoint | None) -> Monitors:
        """Create the folder if it does not exist, write the configuration, and open the monitors.

        Args:
            config: the configuration.
            checkpoint: the checkpoint that the run resumes from, or None. Later records are removed.

        Raises:
            UserError: if another job uses the folder or has trained in it in the meantime, it cannot be written, or a
                tracker of a new run cannot be opened.
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
            curves = TensorBoardMonitor(folder / "tensorboard", purge_step=step + 1, config=config.to_yaml())
            resumes = checkpoint is not None and checkpoint.is_in(folder)
            trackers = RunTrackers(config.log.trackers, folder, resumes=resumes)
        except OSError as error:
            raise _unusable(folder, error) from None
        return Monitors([self, metrics, curves, trackers, ConsoleMonitor(config.train.steps)])

    def check(self) -> None:
        """Check that this job still holds the folder.

        Raises:
            UserError: if another job has taken it over, because this job showed no heartbeat for too long.
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
        """Check the lock before the other monitors write the record."""
        self.check()

    def close(self) -> None:
        """Do nothing. The job holds the folder until ``release``."""

    def release(self) -> None:
        """Release the lock if this job holds it."""
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
    """Check that a run folder can be created and written, without creating it. Called before the data is prepared.

    Raises:
        UserError: if it cannot be created or written.
    """
    present = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not present.is_dir():
        raise UserError(f"run.dir is {folder}, but {present} is not a folder; write a folder that can be written")
    if not os.access(present, os.W_OK | os.X_OK):
        raise UserError(f"run.dir is {folder}, and {present} cannot be written; write a folder that can")


def _copy_history(source: Path, target: Path) -> None:
    """Copy the records of the parent run, if it has any. Records after the checkpoint are removed later."""
    try:
        records = source.read_bytes()
    except FileNotFoundError:
        return
    write_atomically(target, records)


def _unusable(folder: Path, error: OSError) -> UserError:
    return UserError(f"run.dir {folder} cannot be used ({error.strerror or error}); write a folder that can be written")
