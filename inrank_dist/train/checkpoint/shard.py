"""The tensor file of one process: safetensors, streamed to disk and hashed while it is written.

The layout is that of ``torch.distributed.checkpoint.HuggingFaceStorageWriter`` with ``save_distributed``: a JSON header
with shapes and offsets, whose metadata gives each part's position in the whole tensor, then the bytes of the tensors.
That writer builds the whole file as one ``bytes`` object; this one holds at most one tensor in addition to the model.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...engine.checkpointable import SavedRows
from ...runtime.safetensors_file import content, header
from .folder import FileEntry

BLOCK = 8 << 20
"""Bytes to hash and write at a time, in parallel."""


def shard_name(rank: int) -> str:
    """Name of a process's tensor file."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def stage(rows: Sequence[SavedRows]) -> list[SavedRows]:
    """Copy the rows to host memory, so that the model may change or be freed. Each copy is freed when it is fetched."""
    copies: dict[str, Tensor] = {}
    for each in rows:
        # Allocate before fetching. The other way round would leave a hole in the heap for every tensor.
        copy = torch.empty(each.count, *each.shape[1:], dtype=each.dtype)
        copies[each.name] = copy.copy_(each.fetch())

    def fetched(each: SavedRows) -> SavedRows:
        return replace(each, fetch=lambda: copies.pop(each.name))

    return [fetched(each) for each in rows]


def write_shard(folder: Path, rank: int, rows: Sequence[SavedRows]) -> dict[str, FileEntry]:
    """Write and flush this process's tensor file. Collective: all processes pass the same names in the same order.

    Returns:
        Name -> entry of the file; empty, without a file, if this process has no rows to save.

    Raises:
        OSError: the file cannot be written. All rows have been fetched even so, so that no other process is blocked.
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
    """Take part in the remaining fetches, which are collective."""
    for each in fetches:
        each.fetch()


def _write(path: Path, held: Sequence[SavedRows], fetches: Iterator[SavedRows]) -> FileEntry:
    digest = hashlib.sha256()
    with path.open("xb") as file, ThreadPoolExecutor(1, thread_name_prefix="sha256") as hasher:

        def write(view: memoryview) -> None:
            for start in range(0, len(view), BLOCK):
                block = view[start : start + BLOCK]
                hashed = hasher.submit(digest.update, block)  # hashlib and write both release the GIL
                file.write(block)
                hashed.result()

        write(memoryview(_header(held)))
        for each in fetches:
            tensor = each.fetch()
            if each.count:
                write(content(tensor))
            del tensor  # free it before the next one is fetched
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return FileEntry(size, digest.hexdigest())


def _header(held: Sequence[SavedRows]) -> bytes:
    """Return the start of the file, with the position of each part in its whole tensor."""
    offsets = {each.name: {"saved_offsets": [each.first, *[0] * (len(each.shape) - 1)]} for each in held}
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    return header(((each.name, (each.count, *each.shape[1:]), each.dtype) for each in held), metadata)
