"""Checks that settings, tokenizer, rank table and tensors of a checkpoint are consistent. Loads no tensors."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...config import Config, load_config
from ...data import Tokenizer
from ...lowrank.convert import convert
from ...lowrank.kinds import kind_of, matrix_shape
from ...models import LanguageModel
from ...optim import moment_names, parameter_roles
from ...runtime.errors import UserError
from ...runtime.paths import is_plain_file, status
from ..building import dense_skeleton
from .folder import MANIFEST, MARKER, read_manifest, verify
from .listing import Damaged, Unreadable, leftovers, named_folders
from .state import STATE, TrainState, read_state
from .tensors import difference, stored_tensors


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    state: TrainState

    @property
    def run_folder(self) -> Path:
        return self.folder.parent.parent

    def is_in(self, run_folder: Path) -> bool:
        """Whether it belongs to this run, rather than one that this run branches from."""
        return os.path.realpath(self.run_folder) == os.path.realpath(run_folder)

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer.model"


def check_contents(checkpoint: Checkpoint) -> None:
    """Build the model from the checkpoint's own settings and rank table on ``meta``, and compare it with the headers of
    the tensor files.

    Raises:
        Damaged: settings or tokenizer cannot be read, or the parts of the checkpoint are inconsistent.
    """
    folder, state = checkpoint.folder, checkpoint.state
    try:
        config, _ = load_config(checkpoint.config_file)
        tokenizer = Tokenizer.load(checkpoint.tokenizer_file)
    except UserError as error:
        raise Damaged(str(error)) from None
    if (tokenizer.fingerprint, tokenizer.vocab_size) != (state.tokenizer, state.vocab_size):
        raise Damaged(f"{checkpoint.tokenizer_file} is not the tokenizer that {STATE} names")
    skeleton = dense_skeleton(config.model, tokenizer.vocab_size, lowrank=config.lowrank)
    shapes = {name: matrix_shape(module) for name, module in skeleton.named_modules() if kind_of(module)}
    for name, layer in state.layout.items():
        if name not in shapes:
            raise Damaged(f"{folder / STATE} has a rank of {name}, which is not a linear layer of the model")
        limit = min(shapes[name])
        if not layer.rank <= layer.modes <= limit:
            raise Damaged(f"{folder / STATE} has rank {layer.rank} and {layer.modes} modes of {limit} in {name}")
        if layer.depth != config.lowrank.depth:
            raise Damaged(f"{folder / STATE} has depth {layer.depth} of {name}, not {config.lowrank.depth}")
    if found := mismatch(checkpoint, config, skeleton, "its settings and rank table make"):
        raise Damaged(f"{folder} holds {found}")


def mismatch(checkpoint: Checkpoint, config: Config, skeleton: LanguageModel, make: str) -> str | None:
    """Describe the first stored tensor that does not match the settings and the checkpoint's rank table; None if all
    match.

    Args:
        skeleton: the dense model of ``config`` on ``meta``.
        make: subject and verb of the description, such as "the settings make".
    """
    state = checkpoint.state
    model = convert(skeleton, state.layout)
    parameters = dict(model.named_parameters())
    moments = {
        f"optimizer.{moment}.{name}": parameters[name]
        for name, role in parameter_roles(model, model.plan.block_modules(model), config.optimizer).items()
        if state.optimizer_steps > 0
        for moment in moment_names(config.optimizer, role)
    }
    return difference(stored_tensors(checkpoint.folder), parameters | moments, make)


State = Literal["complete", "damaged", "incomplete", "unreadable"]


@dataclass(frozen=True)
class Finding:
    """Result of examining one folder below ``checkpoints``.

    Attributes:
        state: complete: all files are there as they were written; incomplete: it was never finished; unreadable: its
            state cannot be determined.
        resumable: whether a run can resume from it: it is complete and its contents are consistent.
        ephemeral: whether it is removed once a newer one is complete; None if its manifest cannot be read.
        files, bytes: number and total size of the files.
        problem: description of what is wrong; empty if nothing is.
    """

    folder: Path
    state: State
    resumable: bool
    ephemeral: bool | None
    files: int
    bytes: int
    problem: str


def examine(run_folder: Path) -> tuple[list[Finding], list[Finding]]:
    """Examine all checkpoints of a run, oldest first, and what interrupted saves left behind. The run may be active.

    Hashes all files, in this process alone. Loads no tensors.
    """
    why = "of a save or a removal that was interrupted or is under way; ignored, and swept away by the next save"
    found = [_examine(folder) for folder in named_folders(run_folder)]
    left = [Finding(folder, "incomplete", False, None, *_size(folder), why) for folder in leftovers(run_folder)]
    return [finding for finding in found if finding], left


def _examine(folder: Path) -> Finding | None:
    """Examine one folder; None if the run has just removed it."""
    state: State = "incomplete"
    ephemeral, problem = None, ""
    try:
        if all(is_plain_file(folder / name) for name in (MANIFEST, MARKER)):
            state = "damaged"
        ephemeral = read_manifest(folder).ephemeral
        verify(folder)
        state = "complete"
        check_contents(Checkpoint(folder, read_state(folder)))
    except Damaged as error:
        problem = str(error)
    except (Unreadable, OSError) as error:
        state, problem = "unreadable", str(error)
    if problem and state != "unreadable" and status(folder, follow_links=False) is None:
        return None
    return Finding(folder, state, not problem, ephemeral, *_size(folder), problem)


def _size(folder: Path) -> tuple[int, int]:
    """Number and size of the accessible files; others are covered by the finding's problem."""
    sizes = []
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append((Path(parent) / name).lstat().st_size)
            except OSError:  # an active save renames and removes files
                continue
    return len(sizes), sum(sizes)
