"""Documents stored on disk in one UTF-8 file, with random access."""

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..runtime.progress import Advance
from .readers import BLOCK_BYTES, BYTE_ORDER_MARK, Piece, decode_utf8


class TextFile:
    """A file with random access, closed when it is garbage-collected."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytes:
        """Read ``size`` bytes from ``offset``.

        Raises:
            OSError: the bytes cannot be read or do not exist.
        """
        content = os.pread(self._descriptor, size, offset)
        while len(content) < size:  # interrupted by a signal, or beyond the limit of one call
            more = os.pread(self._descriptor, size - len(content), offset + len(content))
            if not more:
                raise OSError("the stored text has become shorter")
            content += more
        return content

    def __del__(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True)
class Documents:
    """Documents stored in ``file``, in any order. A document may be left out or occur twice.

    Attributes:
        offsets, sizes: (n,) int64, in bytes.
        digests: (n, 32) uint8, sha256 of each document's UTF-8.
    """

    file: TextFile
    offsets: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[str]:
        """The documents, each as one string."""
        for index in range(len(self)):
            yield "".join(self.pieces(index))

    @property
    def total_bytes(self) -> int:
        """Bytes of all documents."""
        return int(self.sizes.sum())

    def take(self, indices: np.ndarray) -> "Documents":
        """Select documents by index."""
        return Documents(self.file, self.offsets[indices], self.sizes[indices], self.digests[indices])

    def pieces(self, index: int, advance: Advance = lambda done: None) -> Iterator[str]:
        """The text of a document in pieces of at most ``BLOCK_BYTES``. Calls ``advance`` for each piece read."""
        offset, size = int(self.offsets[index]), int(self.sizes[index])
        if size <= BLOCK_BYTES:
            advance(size)
            return iter([self.file.read(offset, size).decode()])

        def blocks() -> Iterator[bytes]:
            for start in range(0, size, BLOCK_BYTES):
                block = self.file.read(offset + start, min(BLOCK_BYTES, size - start))
                advance(len(block))
                yield block

        return decode_utf8(blocks(), "the stored text")

    def heads(self, max_bytes: int) -> Iterator[str]:
        """The documents up to ``max_bytes`` in total, the last one truncated at a character."""
        left = max_bytes
        for index in range(len(self)):
            if left <= 0:
                return
            yield self.head(index, left)
            left -= int(self.sizes[index])

    def head(self, index: int, max_bytes: int) -> str:
        """A document truncated to ``max_bytes`` at a character."""
        return self.file.read(int(self.offsets[index]), min(max_bytes, int(self.sizes[index]))).decode(errors="ignore")

    def cut_last(self, max_bytes: int) -> "Documents":
        """A copy whose last document is truncated to ``max_bytes`` at a character."""
        kept, digest = 0, hashlib.sha256()
        for text in self.pieces(len(self) - 1):
            content = text.encode()[: max_bytes - kept].decode(errors="ignore").encode()
            kept += len(content)
            digest.update(content)
            if len(content) < len(text.encode()):
                break
        sizes, digests = self.sizes.copy(), self.digests.copy()
        sizes[-1], digests[-1] = kept, np.frombuffer(digest.digest(), dtype=np.uint8)
        return replace(self, sizes=sizes, digests=digests)


def store(pieces: Iterable[Piece], file: Path, advance: Advance) -> Documents:
    """Write documents to ``file``, without byte-order marks at their start.

    Raises:
        OSError: the file cannot be written.
    """
    sizes, digests = array("q"), bytearray()
    size, digest, at_start = 0, hashlib.sha256(), True
    with file.open("wb") as target:
        for text, last in pieces:
            content = (text.removeprefix(BYTE_ORDER_MARK) if at_start else text).encode()
            at_start = at_start and not text
            target.write(content)
            digest.update(content)
            size += len(content)
            advance(len(content))
            if last:
                sizes.append(size)
                digests += digest.digest()
                size, digest, at_start = 0, hashlib.sha256(), True
    counted = np.array(sizes, dtype=np.int64)
    return Documents(
        file=TextFile(file),
        offsets=np.cumsum(counted) - counted,
        sizes=counted,
        digests=np.frombuffer(bytes(digests), dtype=np.uint8).reshape(-1, 32),
    )
