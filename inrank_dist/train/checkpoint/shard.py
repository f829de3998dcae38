"""One process's file of a checkpoint: safetensors, streamed to the disk and hashed on the way.

The layout is that of ``torch.distributed.checkpoint.HuggingFaceStorageWriter`` with ``save_distributed``: a header of
JSON with shapes and offsets, in its metadata the place of each part in its whole tensor, then the bytes of the tensors.
That writer makes the whole file as one ``bytes`` in memory; here no more than one tensor is held beside the model.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engine.engine import SavedRows
from .folder import FileEntry

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""torch's dtype -> its name in safetensors."""

BLOCK = 8 << 20
"""Bytes that are hashed while they are written."""


def shard_name(rank: int) -> str:
    """The name of a process's tensor file."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def stage(rows: Sequence[SavedRows]) -> list[SavedRows]:
    """Copies in host memory, which the model may outlive or change; each is freed when it has been fetched."""
    copies: dict[str, Tensor] = {}
    for each in rows:
        # Made before what is fetched: the other way round that would leave a hole in the heap at every tensor.
        copy = torch.empty(each.count, *each.shape[1:], dtype=each.dtype)
        copies[each.name] = copy.copy_(each.fetch())

    def fetched(each: SavedRows) -> SavedRows:
        return replace(each, fetch=lambda: copies.pop(each.name))

    return [fetched(each) for each in rows]


def write_shard(folder: Path, rank: int, rows: Sequence[SavedRows]) -> dict[str, FileEntry]:
    """Write and flush this process's tensor file; all processes call it together, with the same names in one order.

    Returns:
        Name -> entry of the file; empty, and no file, where this process has no rows to save.

    Raises:
        OSError: it cannot be written; by then everything was fetched, so that the other processes do not wait.
    """
    held = [each for each in rows if each.count]
    fetches = iter(rows)
    try:
        files = {shard_name(rank): _write(folder / shard_name(rank), held, fetches)} if held else {}
    except OSError:
        _fetch_all(fetches)
        raise
    _fetch_all(fetches)
    return files


def _fetch_all(fetches: Iterator[SavedRows]) -> None:
    """Take part in the rest, for the other processes."""
    for each in fetches:
        each.fetch()


def _write(path: Path, held: Sequence[SavedRows], fetches: Iterator[SavedRows]) -> FileEntry:
    digest = hashlib.sha256()
    with path.open("xb") as file, ThreadPoolExecutor(1, thread_name_prefix="sha256") as hasher:

        def write(content: memoryview) -> None:
            for start in range(0, len(content), BLOCK):
                block = content[start : start + BLOCK]
                hashed = hasher.submit(digest.update, block)  # hashlib and write both let other threads run
                file.write(block)
                hashed.result()

        write(memoryview(_header(held)))
        for each in fetches:
            tensor = each.fetch()
            if each.count:
                write(_bytes_of(tensor))
            del tensor  # before the next one is fetched
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return FileEntry(size, digest.hexdigest())


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes, which share its memory where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous()
    # A dimension of size 1 may have any stride in a contiguous tensor, which then cannot be viewed as bytes.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().data.cast("B")


def _header(held: Sequence[SavedRows]) -> bytes:
    """What a safetensors file begins with: the length of the JSON in 8 bytes, and the JSON, filled up to 8 bytes."""
    places = {each.name: {"saved_offsets": [each.first, *[0] * (len(each.shape) - 1)]} for each in held}
    metadata = {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for each in held:
        start, end = end, end + each.nbytes
        shape = [each.count, *each.shape[1:]]
        entries[each.name] = {"dtype": DTYPES[each.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
