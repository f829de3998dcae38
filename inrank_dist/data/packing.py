"""Packs a stream of token ids into rows of equal length."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

#: Packed rows and tokens per Arrow record batch, the unit in which a data set is searched.
ROWS_PER_BATCH, TOKENS_PER_BATCH = 1000, 1 << 22


Packed = tuple[int, np.ndarray]
"""Number of rows, and the count of each id (up to the largest id that occurs)."""


def pack(
    stream: Iterable[np.ndarray], dtype: np.dtype, block_length: int, target: Path, *, first: int | None = None
) -> Packed:
    """Cut a stream of token ids into rows ``input_ids`` of ``block_length + 1``, in the Arrow stream file ``target``.

    Each row starts with the last token of the row before. If ``first`` is given, it starts with that token instead, so
    that the model learns to continue it. The tokens to predict are the same, plus the first token of the stream. Fewer
    than ``block_length`` tokens at the end are dropped.

    Args:
        stream: id arrays of any length and of type ``dtype``.

    Returns:
        Number of rows, and the count of each id in the whole stream (up to the largest id that occurs).

    Raises:
        OSError: the file cannot be written.
    """
    kind = pa.list_(pa.from_numpy_dtype(dtype), block_length + 1)
    batch = min(max(TOKENS_PER_BATCH // block_length, 1), ROWS_PER_BATCH)
    counts = np.zeros(0, dtype=np.int64)
    count = 0
    # Buffer ids until they fill a record batch, independently of the lengths of the arrays in the stream.
    waiting: list[np.ndarray] = [] if first is None else [np.array([first], dtype=dtype)]
    length = len(waiting)
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, pa.schema({"input_ids": kind})) as writer:

        def write(tokens: np.ndarray) -> np.ndarray:
            """Write the complete rows in ``tokens``. Returns the rest, from the last token of the last row."""
            nonlocal count
            rows = max(len(tokens) - 1, 0) // block_length
            for start in range(0, rows, batch):
                end = min(start + batch, rows)
                window = tokens[start * block_length : end * block_length + 1]
                overlapping = np.lib.stride_tricks.sliding_window_view(window, block_length + 1)[::block_length].copy()
                if first is not None:
                    overlapping[:, 0] = first
                values = pa.FixedSizeListArray.from_arrays(pa.array(overlapping.ravel()), type=kind)
                writer.write_batch(pa.record_batch([values], names=["input_ids"]))
            count += rows
            return tokens[rows * block_length :]

        for piece in stream:
            found = np.bincount(piece)
            counts, found = (found, counts) if len(found) > len(counts) else (counts, found)
            counts[: len(found)] += found
            waiting.append(piece)
            length += len(piece)
            if length > batch * block_length:
                rest = write(np.concatenate(waiting))
                waiting, length = [rest], len(rest)
        if waiting:
            write(np.concatenate(waiting))
    return count, counts


def unigram_entropy(train_counts: np.ndarray, validation_counts: np.ndarray, vocab_size: int) -> float:
    """Cross-entropy, in nats per token, of the validation tokens under the training tokens' frequencies.

    ``- sum_i v_i / sum(v) * log((t_i + 1) / (sum(t) + vocab_size))``. Add-one (Laplace) smoothing keeps the cost of a
    token that does not occur in training finite.
    """
    train, validation = (
        np.pad(counts.astype(np.float64), (0, vocab_size - len(counts))) for counts in (train_counts, validation_counts)
    )
    log_frequency = np.log((train + 1) / (train.sum() + vocab_size))
    return float(-(validation * log_frequency).sum() / validation.sum())
