"""Which documents are trained on and which validate, in which order."""

import hashlib
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, concatenate_datasets

from inrank_dist.data.corpus import Documents
from inrank_dist.data.permutation import stable_permutation
from inrank_dist.data.progress import phase
from inrank_dist.data.settings import DataSettings
from inrank_dist.errors import UserError

#: Documents per step of a pass over the text.
BATCH = 100

#: The order of documents is one for all runs; the order of samples is the loader's.
ORDER_SEED = 0


@dataclass(frozen=True)
class Corpus:
    """The text of a run: one document a row of column ``text``. ``digest`` (hex) is over all of it, in order;
    ``train_bytes`` and ``validation_bytes`` count it in UTF-8."""

    train: Dataset
    validation: Dataset
    digest: str
    train_bytes: int
    validation_bytes: int


@dataclass(frozen=True)
class _Measured:
    """Documents of one set, with their sizes (n,) in bytes and sha256 digests (n, 32)."""

    rows: Dataset
    sizes: np.ndarray
    digests: np.ndarray

    def take(self, indices: np.ndarray) -> "_Measured":
        return _Measured(self.rows.select(indices), self.sizes[indices], self.digests[indices])


def choose_documents(documents: Documents, data: DataSettings, *, progress: bool) -> Corpus:
    """Drop empty documents, hold out validation, shuffle once and for all, and cap at ``data.max_bytes``.

    Held out are the documents with the smallest hashes (of the name where a document has one, else of the
    text, so that copies stay together), as many as reach ``data.validation_fraction`` of the bytes; a
    document larger than that share is held out only where all are.

    Raises:
        UserError: there is no text, or too few documents to hold one out.
    """
    train = _measure(documents.train, "reading the training text", progress)
    validation = None
    if documents.validation is not None:
        validation = _measure(documents.validation, "reading the validation text", progress)
    for name, part in (("training", train), ("validation", validation)):
        if part is not None and not part.sizes.any():
            raise UserError(f"data.source {data.source} gives no {name} text - name data with text in it")
    if validation is None:
        keys = train.digests if documents.names is None else np.stack([_sha256(name) for name in documents.names])
        train, validation = _hold_out(train, keys, data.validation_fraction)
    parts = []
    for name, part in (("training", train), ("validation", validation)):
        part = part.take(np.flatnonzero(part.sizes))
        if not data.join_rows:
            part = part.take(stable_permutation(len(part.sizes), ORDER_SEED))
        if data.max_bytes is not None:
            part = _cap(part, data.max_bytes)
        if not len(part.sizes):
            raise UserError(f"data.max_bytes is {data.max_bytes}, less than one character of the {name} text")
        parts.append(part)
    train, validation = parts
    digest = hashlib.sha256(train.digests.tobytes() + b"validation" + validation.digests.tobytes())
    return Corpus(train.rows, validation.rows, digest.hexdigest(), int(train.sizes.sum()), int(validation.sizes.sum()))


def _measure(rows: Dataset, title: str, progress: bool) -> _Measured:
    sizes = np.zeros(len(rows), dtype=np.int64)
    digests = np.zeros((len(rows), 32), dtype=np.uint8)
    with phase(title, len(rows), enabled=progress) as advance:
        for start in range(0, len(rows), BATCH):
            texts = rows[start : start + BATCH]["text"]
            for index, text in enumerate(texts, start):
                sizes[index] = len((text or "").encode())
                digests[index] = _sha256(text or "")
            advance(len(texts))
    return _Measured(rows, sizes, digests)


def _sha256(text: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint8)


def _hold_out(train: _Measured, keys: np.ndarray, fraction: float) -> tuple[_Measured, _Measured]:
    full = np.flatnonzero(train.sizes)
    share = fraction * train.sizes.sum()
    # One document larger than the whole share would make validation both too large and too much alike.
    eligible = full[train.sizes[full] <= share]
    if not len(eligible):
        eligible = full
    first_bytes = np.ascontiguousarray(keys).view(">u8")[:, 0]
    by_key = eligible[np.argsort(first_bytes[eligible], kind="stable")]
    count = int(np.searchsorted(np.cumsum(train.sizes[by_key]), share)) + 1
    while count < len(by_key) and first_bytes[by_key[count]] == first_bytes[by_key[count - 1]]:
        count += 1
    held_out = by_key[:count]
    rest = np.setdiff1d(full, held_out)
    if not len(rest):
        raise UserError(
            f"the text has {len(np.unique(first_bytes[full]))} different documents, too few to hold one out - name"
            " validation data (data.validation_paths, data.validation_split) or give more documents"
        )
    return train.take(rest), train.take(held_out)


def _cap(part: _Measured, max_bytes: int) -> _Measured:
    """The first ``max_bytes`` bytes; the document in which they end is cut at a character."""
    ends = np.cumsum(part.sizes)
    whole = int(np.searchsorted(ends, max_bytes, side="right"))
    room = max_bytes - (int(ends[whole - 1]) if whole else 0)
    kept = part.take(np.arange(whole))
    if whole == len(ends):
        return kept
    cut = part.rows[whole]["text"].encode()[:room].decode(errors="ignore")
    if not cut:
        return kept
    last = Dataset.from_dict({"text": [cut]}, features=part.rows.features)
    return _Measured(
        concatenate_datasets([kept.rows, last]),
        np.append(kept.sizes, len(cut.encode())),
        np.concatenate([kept.digests, _sha256(cut)[None]]),
    )
