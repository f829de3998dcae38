"""Documents on disk, as one file of UTF-8: read piece by piece, in any order."""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .readers import BLOCK_BYTES, BYTE_ORDER_MARK, Piece, decode_utf8

#: Called with numbers of bytes that are done.
Advance = Callable[[int], None]


class TextFile:
    """A file that is read at any place; closed when nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on.

        Raises:
            OSError: they cannot be read, or are not there.
        """
        content = os.pread(self._descriptor, size, offset)
        while len(content) < size:  # a signal, or more than one call gives
            more = os.pread(self._descriptor, size - len(content), offset + len(content))
            if not more:
                raise OSError("the stored text has become shorter")
            content += more
        return content

    def __del__(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True)
class Documents:
    """Documents that lie in ``file``, in some order; a document may be left out or come twice.

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
        """The documents, each as a whole."""
        for index in range(len(self)):
            yield "".join(self.pieces(index))

    @property
    def total_bytes(self) -> int:
        """Of all documents."""
        return int(self.sizes.sum())

    def take(self, indices: np.ndarray) -> "Documents":
        """The documents of these numbers, in their order."""
        return Documents(self.file, self.offsets[indices], self.sizes[indices], self.digests[indices])

    def pieces(self, index: int, advance: Advance = lambda done: None) -> Iterator[str]:
        """The text of one document, in pieces of at most ``BLOCK_BYTES``; ``advance`` is told of each that is read."""
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
        """The first ``max_bytes`` of the documents, each as a whole, the last one cut at a character."""
        left = max_bytes
        for index in range(len(self)):
            if left <= 0:
                return
            yield self.head(index, left)
            left -= int(self.sizes[index])

    def head(self, index: int, max_bytes: int) -> str:
        """The first ``max_bytes`` of one document, cut at a character."""
        return self.file.read(int(self.offsets[index]), min(max_bytes, int(self.sizes[index]))).decode(errors="ignore")

    def cut_last(self, max_bytes: int) -> "Documents":
        """The same documents with the last one cut at the last character that ends within ``max_bytes``."""
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
    """Write documents into ``file``; a byte-order mark at the start of one is left out.

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
