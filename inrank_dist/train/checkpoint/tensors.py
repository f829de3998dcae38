"""Reads tensors from a checkpoint with ``torch.distributed.checkpoint``; every process reads its own rows."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ...engine.engine import Engine
from ...runtime.environment import logs_for_node
from ...runtime.progress import phase
from .listing import Damaged
from .state import TrainState

# A single process loads without torch.distributed on purpose.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@dataclass(frozen=True)
class Stored:
    """Shape and dtype of a whole tensor, from the files' headers."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def load_tensors(folder: Path, state: TrainState, engine: Engine) -> None:
    """Read parameters and moments into an engine that was built with the checkpoint's layout.

    Raises:
        Damaged: a tensor is missing, incomplete, or has another shape or dtype.
    """
    stored = stored_tensors(folder)

    def read(tensors: dict[str, Tensor]) -> None:
        check_tensors(folder, stored, tensors)
        with phase(f"reading {folder.name}", enabled=logs_for_node()):
            _read(folder, tensors)

    engine.restore(state.optimizer_steps, read)


def load_parameters(folder: Path, parameters: dict[str, Tensor]) -> None:
    """Read the parameters into plain tensors, in a single process.

    Raises:
        Damaged: see ``load_tensors``.
    """
    stored = {name: each for name, each in stored_tensors(folder).items() if not name.startswith("optimizer.")}
    check_tensors(folder, stored, parameters)
    with phase(f"reading {folder.name}"):
        _read(folder, parameters, no_dist=True)


def _read(folder: Path, tensors: dict[str, Tensor], **options: Any) -> None:
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), **options)


class TensorReader:
    """Reads whole tensors of a checkpoint one at a time, in a single process.

    Raises:
        Damaged: see ``stored_tensors``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, metadata = folder, _read_metadata(folder)
        _stored(folder, metadata)  # raises
        self._parts: dict[str, list[tuple[int, str]]] = {}
        for index, place in metadata.storage_data.items():
            first = index.offset[0] if index.offset else 0
            self._parts.setdefault(index.fqn, []).append((first, Path(place.relative_path).name))

    def __call__(self, name: str) -> Tensor:
        """Return a tensor on the CPU.

        Raises:
            Damaged: the checkpoint has no such tensor.
        """
        if name not in self._parts:
            raise Damaged(f"{self._folder} holds no {name}")
        parts = []
        try:
            for _, file in sorted(self._parts[name]):
                with safe_open(self._folder / file, "pt") as opened:
                    parts.append(opened.get_tensor(name))
        except OSError as error:
            raise Damaged(
                f"{self._folder} cannot be read ({error.strerror or error}); it may have been removed"
            ) from None
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint, from the headers of its files.

    Raises:
        Damaged: a file is not a safetensors file, or the files do not contain every element exactly once.
    """
    return _stored(folder, _read_metadata(folder))


def _read_metadata(folder: Path) -> Metadata:
    """Read the headers of all files.

    Raises:
        Damaged: a file is not a safetensors file.
    """
    try:
        return HuggingFaceStorageReader(str(folder)).read_metadata()
    except Exception as error:
        raise Damaged(f"{folder} has a tensor file that cannot be read ({error})") from None


def _stored(folder: Path, metadata: Metadata) -> dict[str, Stored]:
    """Return the tensors that the headers describe.

    Raises:
        Damaged: the files do not contain every element exactly once.
    """
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
    """Whether the parts (offsets, sizes), in order, cover the rows of the whole tensor exactly once.

    torch would read the parts that exist and silently leave the rest of the tensor unchanged.
    """
    row = 0
    for offsets, sizes in parts:
        if offsets != (row, *[0] * (len(whole) - 1)) or sizes[1:] != whole[1:]:
            return False
        row += sizes[0]
    return (row,) == whole[:1]


def check_tensors(folder: Path, stored: Mapping[str, Stored], wanted: Mapping[str, Tensor]) -> None:
    """Compare the stored tensors with those of the model built from the settings and the rank table.

    Raises:
        Damaged: with the name of the first tensor that differs.
    """
    found = difference(stored, wanted, "the settings make")
    if found:
        raise Damaged(f"{folder} holds {found}; train with the settings of this run, or write another run.dir")


def difference(stored: Mapping[str, Stored], wanted: Mapping[str, Tensor], make: str) -> str | None:
    """Describe the first tensor that is not stored as wanted; None if all are."""
    for name in sorted(stored.keys() | wanted.keys()):
        found = stored.get(name)
        expected = Stored(tuple(wanted[name].shape), wanted[name].dtype) if name in wanted else None
        if found != expected:
            return f"{name} as {_describe(found)} where {make} {_describe(expected)}"
    return None


def _describe(tensor: Stored | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
