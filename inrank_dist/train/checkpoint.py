"""Checkpoints: plain safetensors and JSON, the same for every engine and any number of processes.

A checkpoint is a folder ``step-00000100``: ``shard-*.safetensors`` (parameters and moments by name, every process its
own rows), ``state.json`` (everything that is not a tensor), ``config.yaml`` and ``tokenizer.model``. It is written
under another name and renamed when it is complete, so a folder of that name is a whole checkpoint. No pickle anywhere.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..engine.engine import Engine
from ..errors import UserError
from ..lowrank.convert import LayerLayout, Layout

FORMAT = 1


@dataclass(frozen=True)
class TrainState:
    """Everything of a run that is no tensor.

    Attributes:
        step: optimizer steps completed.
        tokens: tokens trained on.
        seconds: training time so far.
        layout: the rank table; the model is built from it before a tensor is read.
        ranks, loader: their states.
        vocab_size, fingerprint, unigram_entropy: of tokenizer and data.
    """

    step: int
    tokens: int
    seconds: float
    layout: Layout
    ranks: dict[str, Any]
    loader: dict[str, Any]
    vocab_size: int
    fingerprint: str
    unigram_entropy: float


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    state: TrainState

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer.model"


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Folders of the complete checkpoints of a run, oldest first."""
    folders = (run_folder / "checkpoints").glob("step-*")
    return sorted(folder for folder in folders if re.fullmatch(r"step-\d{8,}", folder.name) and folder.is_dir())


def find_checkpoint(run_folder: Path, step: int | None = None) -> Checkpoint:
    """The newest complete checkpoint, or that of a step.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not run_folder.is_dir():
        raise UserError(f"{run_folder} is not a run folder; write --run with the folder of a training run")
    folders = list_checkpoints(run_folder)
    if not folders:
        raise UserError(f"{run_folder} holds no complete checkpoint; train it first")
    if step is None:
        return read_checkpoint(folders[-1])
    for folder in folders:
        if int(folder.name.removeprefix("step-")) == step:
            return read_checkpoint(folder)
    present = ", ".join(str(int(folder.name.removeprefix("step-"))) for folder in folders)
    raise UserError(f"{run_folder} holds no checkpoint of step {step}; write one of {present}")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read what is no tensor."""
    try:
        content = json.loads((folder / "state.json").read_text())
        if content["format"] != FORMAT:
            raise UserError(f"{folder} has format {content['format']}; this version reads format {FORMAT}")
        del content["format"]
        content["layout"] = {name: LayerLayout(**layer) for name, layer in content["layout"].items()}
        return Checkpoint(folder, TrainState(**content))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / 'state.json'} is damaged ({error}); remove {folder} to use the one before"
        ) from None


def save_checkpoint(
    run_folder: Path,
    engine: Engine,
    state: TrainState,
    *,
    config: str,
    save_tokenizer: Callable[[Path], None],
    keep: int,
) -> Path:
    """Write a checkpoint, then remove the oldest beyond ``keep``. All processes call it together."""
    context = engine.context
    final = run_folder / "checkpoints" / f"step-{state.step:08d}"
    partial = final.with_name(f"tmp-{final.name}")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def commit() -> None:
        (partial / "state.json").write_text(json.dumps({"format": FORMAT, **asdict(state)}, indent=1))
        (partial / "config.yaml").write_text(config)
        save_tokenizer(partial / "tokenizer.model")
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        for old in list_checkpoints(run_folder)[:-keep]:
            shutil.rmtree(old)

    context.main_does(begin)
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
    _quietly(dcp.save, engine.tensors(), storage_writer=writer)
    context.main_does(commit)
    return final


def load_checkpoint(checkpoint: Checkpoint, engine: Engine) -> None:
    """Read parameters and moments into an engine that was built with the checkpoint's layout.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    shapes = stored_shapes(checkpoint.folder)
    if any(name.startswith("optimizer.") for name in shapes):
        engine.allocate_moments(checkpoint.state.step)
    target = engine.tensors()
    _check_shapes(checkpoint.folder, shapes, {name: tuple(t.shape) for name, t in target.items()})
    _quietly(dcp.load, target, storage_reader=HuggingFaceStorageReader(str(checkpoint.folder)))


def load_parameters(checkpoint: Checkpoint, parameters: dict[str, Tensor]) -> None:
    """Read parameters alone into plain tensors, in one process."""
    shapes = stored_shapes(checkpoint.folder)
    _check_shapes(
        checkpoint.folder,
        {name: shape for name, shape in shapes.items() if not name.startswith("optimizer.")},
        {name: tuple(t.shape) for name, t in parameters.items()},
    )
    reader = HuggingFaceStorageReader(str(checkpoint.folder))
    _quietly(dcp.load, parameters, storage_reader=reader, no_dist=True)


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Whole shape of every tensor in a checkpoint, from the files' headers."""
    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    except Exception as error:
        raise UserError(f"{folder} is damaged ({error}); remove it to use the checkpoint before") from None
    tensors = metadata.state_dict_metadata.items()
    return {name: tuple(entry.size) for name, entry in tensors if isinstance(entry, TensorStorageMetadata)}


def _check_shapes(folder: Path, stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            raise UserError(
                f"{folder} holds {name} with shape {stored.get(name)} where the settings make {wanted.get(name)}; "
                "train with the settings of this run or write another run.dir"
            )


def _quietly(work: Callable[..., object], *arguments: object, **options: object) -> None:
    """Without torch's warning that a single process saves or loads on its own, which is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        work(*arguments, **options)
