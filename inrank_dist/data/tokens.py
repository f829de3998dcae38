"""Files of tokens: NumPy arrays, raw binary files, and the indexed data sets of Megatron-LM."""

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..runtime.errors import UserError
from ..runtime.progress import Advance
from .globs import find_files

SUFFIXES = (".npy", ".bin")

#: Tokens to read at a time.
BLOCK_TOKENS = 1 << 20

#: First number of the header of 256 int32 that llm.c and its descendants put before tokens -> its version, their dtype.
HEADERS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
HEADER_BYTES = 1024

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def find_token_files(setting: str, patterns: list[str]) -> list[Path]:
    """Find the token files that ``patterns`` match, see ``find_files``.

    Raises:
        UserError: as ``find_files``.
    """
    return find_files(setting, patterns, SUFFIXES)


def companions(paths: list[Path]) -> list[Path]:
    """The index files that belong to ``paths``, where there are some."""
    return [path.with_suffix(".idx") for path in paths if path.suffix == ".bin" and path.with_suffix(".idx").exists()]


def read_tokens(
    paths: list[Path], *, dtype: str, eos_id: int, vocab_size: int, advance: Advance
) -> Iterator[np.ndarray]:
    """Read the tokens of files one after the other.

    A Megatron data set is read by documents, and a document without an end-of-document token gets one.

    Args:
        dtype: NumPy dtype of raw files without a header.
        eos_id: the token that separates documents.
        vocab_size: number of tokens of the tokenizer.
        advance: called with the number of bytes just read.

    Returns:
        1-D integer arrays.

    Raises:
        UserError: a file cannot be used, or holds an id that the tokenizer does not have.
    """
    for path in paths:
        try:
            if path.suffix == ".npy":
                blocks = _blocks(_numpy_array(path))
            elif path.with_suffix(".idx").exists():
                blocks = _megatron(path, eos_id)
            else:
                blocks = _blocks(_raw_array(path, dtype, vocab_size))
            for block in blocks:
                if block.size and not 0 <= int(block.min()) <= int(block.max()) < vocab_size:
                    wrong = int(block.min()) if block.min() < 0 else int(block.max())
                    raise UserError(
                        f"{path} holds the token {wrong}, and the tokenizer has {vocab_size} tokens; write the "
                        "tokenizer.path it was made with, or the right data.token_dtype"
                    )
                advance(block.nbytes)
                yield block
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror or error}); make it readable or leave it out"
            ) from error


def _blocks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(tokens), BLOCK_TOKENS):
        yield np.asarray(tokens[start : start + BLOCK_TOKENS])


def _numpy_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged header leads to
        raise UserError(f"{path} is not a NumPy array ({' '.join(str(error).split())}); leave it out") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"{path} is not a 1-D array of integers; write arrays of token ids")
    return array


def _raw_array(path: Path, dtype: str, vocab_size: int) -> np.ndarray:
    size, start = path.stat().st_size, 0
    with path.open("rb") as file:
        header = file.read(12)
    magic, version, count = struct.unpack("<iii", header.ljust(12, b"\0"))
    if magic in HEADERS:
        known, dtype = HEADERS[magic]
        start = HEADER_BYTES
        if version != known or size != HEADER_BYTES + np.dtype(dtype).itemsize * count:
            raise UserError(
                f"{path} has a header of version {version} and {count} tokens, but {size} bytes; leave it out"
            )
    elif dtype == "uint16" and vocab_size > 1 << 16:  # halves of larger numbers would all be tokens
        raise UserError(
            f"data.token_dtype is uint16, but the tokenizer of {path} has {vocab_size} tokens; write uint32 or int32"
        )
    width = np.dtype(dtype).itemsize
    if (size - start) % width:
        raise UserError(f"{path} has {size} bytes, not a multiple of {width}; write the right data.token_dtype")
    return np.memmap(path, dtype=dtype, mode="r", offset=start) if size > start else np.zeros(0, dtype=dtype)


def _megatron(path: Path, eos_id: int) -> Iterator[np.ndarray]:
    """The tokens of a Megatron data set. Its index lists sequences, and the first sequence of each document."""
    dtype, lengths, documents = _megatron_index(path.with_suffix(".idx"))
    size = path.stat().st_size
    if size != int(lengths.sum()) * dtype.itemsize:
        raise UserError(
            f"{path} has {size} bytes where its index has {int(lengths.sum())} tokens; write a whole data set"
        )
    tokens = np.memmap(path, dtype=dtype, mode="r") if size else np.zeros(0, dtype=dtype)
    end_of_document = np.array([eos_id], dtype=dtype if eos_id <= np.iinfo(dtype).max else np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    waiting: list[np.ndarray] = []
    count = 0
    for first, last in itertools.pairwise(documents):
        document = np.asarray(tokens[ends[first] : ends[last]])
        if not document.size:
            continue
        waiting.append(document)
        if document[-1] != eos_id:
            waiting.append(end_of_document)
        count += len(document) + 1
        if count >= BLOCK_TOKENS:
            yield np.concatenate(waiting)
            waiting, count = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _megatron_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """Dtype of the tokens, ``(n,)`` lengths of the sequences, and the first sequence of each document and their end."""
    content = path.read_bytes()
    fixed = len(MEGATRON_MAGIC) + struct.calcsize("<QBQQ")
    if len(content) < fixed or not content.startswith(MEGATRON_MAGIC):
        raise UserError(f"{path} is not an index of Megatron-LM; leave its .bin file out")
    version, code, sequences, documents = struct.unpack("<QBQQ", content[len(MEGATRON_MAGIC) : fixed])
    if version != 1 or code not in MEGATRON_DTYPES or len(content) < fixed + 12 * sequences + 8 * documents:
        raise UserError(f"{path} is damaged or of another version; leave its .bin file out")
    lengths = np.frombuffer(content, "<i4", sequences, fixed).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", sequences, fixed + 4 * sequences)
    starts = np.frombuffer(content, "<i8", documents, fixed + 12 * sequences)
    ordered = starts.size and starts[0] == 0 and starts[-1] == sequences and bool((np.diff(starts) >= 0).all())
    if not ordered or bool((lengths < 0).any()):
        raise UserError(f"{path} is damaged; leave its .bin file out")
    if bool((pointers != (np.cumsum(lengths) - lengths) * np.dtype(MEGATRON_DTYPES[code]).itemsize).any()):
        raise UserError(f"{path} has its sequences in another order than its .bin file; leave it out")
    return np.dtype(MEGATRON_DTYPES[code]), lengths, starts
