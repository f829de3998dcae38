"""Tensors out of a checkpoint's files, through ``torch.distributed.checkpoint``: every process its own rows."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ...engine.engine import Engine
from .listing import Damaged
from .state import TrainState

# A single process loads on its own here, which is what is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@dataclass(frozen=True)
class Stored:
    """A whole tensor as the files' headers tell of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def load_tensors(folder: Path, state: TrainState, engine: Engine) -> None:
    """Read parameters and moments into an engine that was built with the checkpoint's layout.

    Raises:
        Damaged: a tensor is missing, incomplete, or of another shape or dtype.
    """
    stored = stored_tensors(folder)

    def read(tensors: dict[str, Tensor]) -> None:
        check_tensors(folder, stored, tensors)
        _read(folder, tensors)

    engine.restore(state.optimizer_steps, read)


def load_parameters(folder: Path, parameters: dict[str, Tensor]) -> None:
    """Read parameters alone into plain tensors, in one process.

    Raises:
        Damaged: as ``load_tensors``.
    """
    stored = {name: each for name, each in stored_tensors(folder).items() if not name.startswith("optimizer.")}
    check_tensors(folder, stored, parameters)
    _read(folder, parameters, no_dist=True)


def _read(folder: Path, tensors: dict[str, Tensor], **options: Any) -> None:
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), **options)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, from the headers of its files alone.

    Raises:
        Damaged: a file is no safetensors file, or the files do not hold every element exactly once.
    """
    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    except Exception as error:
        raise Damaged(f"{folder} has a tensor file that cannot be read ({error})") from None
    stored = {}
    dtypes: dict[str, set[torch.dtype]] = {}
    for index, place in metadata.storage_data.items():
        dtypes.setdefault(index.fqn, set()).add(place.dtype)
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        whole = tuple(entry.size)
        parts = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks if chunk.sizes.numel())
        if not _covers(parts, whole):
            raise Damaged(f"{folder} does not hold every row of {name} exactly once")
        if len(dtypes[name]) > 1:
            raise Damaged(f"{folder} holds parts of {name} in different dtypes")
        stored[name] = Stored(whole, entry.properties.dtype)
    return stored


def _covers(parts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], whole: tuple[int, ...]) -> bool:
    """Whether parts (offsets, sizes), in order, are the rows of a whole tensor, each once.

    torch reads what there is and leaves the rest as it was, without a word.
    """
    row = 0
    for offsets, sizes in parts:
        if offsets != (row, *[0] * (len(whole) - 1)) or sizes[1:] != whole[1:]:
            return False
        row += sizes[0]
    return (row,) == whole[:1]


def check_tensors(folder: Path, stored: Mapping[str, Stored], wanted: Mapping[str, Tensor]) -> None:
    """Compare what is stored with what the settings and the rank table make.

    Raises:
        Damaged: with the name of the first tensor that differs.
    """
    found = difference(stored, wanted, "the settings make")
    if found:
        raise Damaged(f"{folder} holds {found}; train with the settings of this run, or write another run.dir")


def difference(stored: Mapping[str, Stored], wanted: Mapping[str, Tensor], make: str) -> str | None:
    """The first tensor that is not stored as it is wanted, in words; None: all are."""
    for name in sorted(stored.keys() | wanted.keys()):
        is_there = stored.get(name)
        made = Stored(tuple(wanted[name].shape), wanted[name].dtype) if name in wanted else None
        if is_there != made:
            return f"{name} as {_shown(is_there)} where {make} {_shown(made)}"
    return None


def _shown(tensor: Stored | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
