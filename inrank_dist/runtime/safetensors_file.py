"""Pieces of a safetensors file, for writers that stream one tensor at a time."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""torch dtype -> safetensors name."""


def header(tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]) -> bytes:
    """Return the start of the file: the length of the JSON in 8 bytes, then the JSON, padded to 8 bytes.

    Args:
        tensors: name, shape and dtype of each tensor, in the order of their bytes in the file.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape, dtype in tensors:
        start, end = end, end + nbytes(shape, dtype)
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the size of a tensor in bytes."""
    return torch.Size(shape).numel() * dtype.itemsize


def content(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes. They share its memory if it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous()
    # In a contiguous tensor, a dimension of size 1 may have any stride, which would prevent a view as bytes.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().data.cast("B")
