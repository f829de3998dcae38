"""Writes checkpoints, synchronously or asynchronously."""

import errno
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

import torch.distributed as dist

from ...engine.checkpointable import SavedRows
from ...engine.engine import Engine
from ...runtime.context import Context
from ...runtime.errors import UserError
from ...runtime.progress import phase
from ..settings import CheckpointSettings
from . import folder as folders
from . import shard
from .folder import FileEntry
from .listing import folder_of
from .state import STATE, TrainState, encode_state

Result = TypeVar("Result")


class CheckpointWriter:
    """Writes the checkpoints of a run. All methods are collective; ``failure`` is local.

    With ``checkpoint.async`` a save returns once the tensors have been copied to host memory. Files, checksums and the
    commit follow in other threads, whose collectives use a separate process group. At most one save is in progress.

    Args:
        run_folder: of the run.
        context: with its process group initialized.
        settings: section ``checkpoint``.
        companions: name -> content of the small files to include in every checkpoint.
    """

    def __init__(
        self,
        run_folder: Path,
        context: Context,
        settings: CheckpointSettings,
        companions: dict[str, bytes],
    ) -> None:
        self.run_folder, self.context, self.settings, self.companions = run_folder, context, settings, companions
        # Objects and asynchronous saves need gloo, and a group whose collectives do not mix with the training's.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._settled: set[str] = set()

    def save(self, engine: Engine, state: TrainState, *, ephemeral: bool = False) -> None:
        """Write a checkpoint, then remove those that ``checkpoint.keep`` and related settings do not retain.

        Raises:
            UserError: this checkpoint, or a previous one still in progress, could not be written. Earlier complete
                checkpoints are unaffected.
        """
        self.finish()
        final = folder_of(self.run_folder, state.step)
        partial = final.with_name(f"tmp-{final.name}")
        self._on_rank_zero(final, lambda: folders.begin(final))
        rows = engine.saved_rows()
        if self.settings.async_:
            self._pending = self._thread.submit(self._complete, final, partial, state, ephemeral, shard.stage(rows))
        else:
            with phase(f"writing {final.name}", enabled=self.context.is_main):
                self._complete(final, partial, state, ephemeral, rows)

    @property
    def failure(self) -> bool:
        """Whether an asynchronous save has failed, as far as this process knows. ``finish`` raises the error."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def finish(self) -> None:
        """Wait for the save in progress.

        Raises:
            UserError: the save failed.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            with phase("writing the checkpoint", enabled=self.context.is_main):
                pending.result()

    def close(self) -> None:
        """Stop the thread once the save in progress is done."""
        self._thread.shutdown(wait=True)

    def _complete(
        self, final: Path, partial: Path, state: TrainState, ephemeral: bool, rows: Sequence[SavedRows]
    ) -> None:
        """Everything from writing the tensor files to removing old checkpoints."""
        files = self._on_all_ranks(final, lambda: shard.write_shard(partial, self.context.rank, rows))
        every = {name: entry for each in self.context.gather(files, self._group) for name, entry in each.items()}
        self._on_rank_zero(final, lambda: self._commit(final, partial, state, ephemeral, every))
        self._on_rank_zero(final, lambda: self._retain(state.step))

    def _commit(
        self, final: Path, partial: Path, state: TrainState, ephemeral: bool, files: dict[str, FileEntry]
    ) -> None:
        files |= folders.seal(partial, {STATE: encode_state(state), **self.companions})
        folders.commit(partial, final, files, ephemeral=ephemeral)

    def _retain(self, newest: int) -> None:
        keep, keep_every = self.settings.keep, self.settings.keep_every
        folders.retain(self.run_folder, newest, keep=keep, keep_every=keep_every, settled=self._settled)

    def _on_rank_zero(self, final: Path, work: Callable[[], object]) -> None:
        """Run ``work`` on process 0. If it fails, all processes raise the same error."""
        self._on_all_ranks(final, work if self.context.is_main else lambda: None)

    def _on_all_ranks(self, final: Path, work: Callable[[], Result]) -> Result:
        """Run ``work`` on every process. If it fails on one, all processes raise the same error."""

        def guarded() -> Result:
            with _WriteErrors(final):
                return work()

        return self.context.on_all_ranks(guarded, self._group)


class _WriteErrors:
    """Turns a failure to write into a ``UserError`` that names the checkpoint."""

    def __init__(self, final: Path) -> None:
        self.final = final

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> Literal[False]:
        if isinstance(error, OSError):
            advice = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make the folder writable"
            raise UserError(
                f"{self.final} could not be written ({error.strerror or error}); {advice} and run the same command "
                "again, which resumes from the last complete checkpoint"
            ) from None
        return False
