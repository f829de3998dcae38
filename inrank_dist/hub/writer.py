"""Safetensors files of a model, written one tensor at a time."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.progress import Advance, phase
from ..runtime.safetensors_file import content, header, nbytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that a model can be exported in, by name."""


@dataclass(frozen=True)
class Planned:
    """A tensor to write.

    Attributes:
        value: computes the tensor, of any floating dtype, which is rounded to ``dtype`` once.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    value: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return nbytes(self.shape, self.dtype)


def write_tensors(folder: Path, tensors: Sequence[Planned], max_shard_bytes: int) -> None:
    """Write ``model.safetensors``, or several files and their index if they are larger than ``max_shard_bytes``.

    File names and index are those of ``transformers``. A tensor larger than ``max_shard_bytes`` gets its own file.

    Raises:
        ValueError: if a computed tensor does not have the planned shape.
    """
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    places: dict[str, str] = {}
    total = sum(tensor.nbytes for tensor in tensors)
    with phase("writing the weights", total, unit="bytes") as advance:
        for index, shard in enumerate(shards):
            name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            _write(folder / name, shard, advance)
            places |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        index_file = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2) + "\n")


def edit_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Change entries of a JSON object that ``transformers`` wrote."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write(path: Path, tensors: Sequence[Planned], advance: Advance) -> None:
    with path.open("xb") as file:
        file.write(header(((each.name, each.shape, each.dtype) for each in tensors), {"format": "pt"}))
        for each in tensors:
            value = each.value()
            if tuple(value.shape) != each.shape:
                raise ValueError(f"{each.name} is {tuple(value.shape)}, where {each.shape} is expected")
            file.write(content(value.to(each.dtype)))
            advance(each.nbytes)
            del value  # before the next one is computed
