"""Documents to token ids, and token ids to rows of equal length."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Sequence, Value

from inrank_dist.data.documents import BATCH
from inrank_dist.data.progress import Advance
from inrank_dist.data.tokenizer import Tokenizer

#: Packed rows per record batch, the unit in which a data set is searched.
ROWS_PER_BATCH = 1000


def tokenise(
    texts: Dataset,
    tokenizer: Tokenizer,
    target: Path,
    *,
    separate: bool,
    num_workers: int,
    advance: Advance,
) -> Dataset:
    """Rows of ``tokens``, one per row of ``text``, in the file ``target``; ``separate`` ends each in the
    separator.

    ``advance`` is called with numbers of documents where one process does the work.
    """
    encode: Callable[[dict[str, list[str]]], dict[str, Any]]
    encode = functools.partial(_encode, tokenizer=tokenizer, separate=separate)
    if num_workers == 1:
        alone = encode

        def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
            advance(len(batch["text"]))
            return alone(batch)

    return texts.map(
        encode,
        batched=True,
        batch_size=BATCH,
        writer_batch_size=BATCH,
        remove_columns=["text"],
        features=Features({"tokens": Sequence(Value(_dtype(tokenizer).name))}),
        num_proc=None if num_workers == 1 else num_workers,
        cache_file_name=str(target),
        # Without it the function is pickled to hash it, for a cache that is not used here.
        new_fingerprint=target.stem,
    )


def pack(tokens: Dataset, block_length: int, target: Path) -> tuple[Dataset, np.ndarray]:
    """Cut the stream of all tokens into rows ``input_ids`` of ``block_length + 1``, each starting on the last
    token of the one before; fewer than ``block_length`` tokens at the end are left out.

    Returns the rows, mapped from the file ``target``, and how often each id occurs in the whole stream
    (counts up to the largest id that does).
    """
    kind = pa.list_(tokens.features["tokens"].feature.pa_type, block_length + 1)
    counts = np.zeros(0, dtype=np.int64)
    with (
        pa.OSFile(str(target), "wb") as file,
        pa.ipc.new_stream(file, pa.schema({"input_ids": kind})) as writer,
    ):
        rest = np.zeros(0, dtype=kind.value_type.to_pandas_dtype())
        for piece in _pieces(tokens):
            found = np.bincount(piece)
            counts, found = (found, counts) if len(found) > len(counts) else (counts, found)
            counts[: len(found)] += found
            stream = np.concatenate([rest, piece])
            rows = max(len(stream) - 1, 0) // block_length
            for first in range(0, rows, ROWS_PER_BATCH):
                last = min(first + ROWS_PER_BATCH, rows)
                window = stream[first * block_length : last * block_length + 1]
                overlapping = np.lib.stride_tricks.sliding_window_view(window, block_length + 1)[::block_length]
                values = pa.array(overlapping.ravel())
                writer.write_batch(
                    pa.record_batch([pa.FixedSizeListArray.from_arrays(values, type=kind)], names=["input_ids"])
                )
            rest = stream[rows * block_length :]
    return Dataset.from_file(str(target)), counts


def unigram_entropy(train_counts: np.ndarray, validation_counts: np.ndarray, vocab_size: int) -> float:
    """Cross-entropy, in nats per token, of the validation tokens under the training tokens' frequencies.

    ``- sum_i v_i / sum(v) * log((t_i + 1) / (sum(t) + vocab_size))``: add-one (Laplace) smoothing, so that a
    token that training lacks costs much and not infinitely much.
    """
    train, validation = (
        np.pad(counts.astype(np.float64), (0, vocab_size - len(counts))) for counts in (train_counts, validation_counts)
    )
    log_frequency = np.log((train + 1) / (train.sum() + vocab_size))
    return float(-(validation * log_frequency).sum() / validation.sum())


def _encode(batch: dict[str, list[str]], tokenizer: Tokenizer, separate: bool) -> dict[str, Any]:
    end = [tokenizer.eos_id] if separate else []
    return {"tokens": [np.array(tokenizer.encode(text) + end, dtype=_dtype(tokenizer)) for text in batch["text"]]}


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)


def _pieces(tokens: Dataset) -> Iterator[np.ndarray]:
    for table in tokens.with_format("arrow").iter(BATCH):
        for chunk in table["tokens"].chunks:
            yield chunk.flatten().to_numpy()
