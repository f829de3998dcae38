"""Safetensors files: pieces for writers that stream one tensor at a time, and opening with errors in one line."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import UserError

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


@contextmanager
def opened(path: Path, if_damaged: str, if_unreadable: str) -> Iterator[Any]:
    """Open a file with ``safe_open`` on the CPU.

    Args:
        if_damaged, if_unreadable: what a user should do, for the end of the error message.

    Raises:
        UserError: the file is damaged or cannot be read, also within the block.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); {if_damaged}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {if_unreadable}") from None
