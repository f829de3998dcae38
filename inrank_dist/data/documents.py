"""Splits documents into training and validation, and orders them."""

import hashlib
import logging
from dataclasses import dataclass

import numpy as np

from ..runtime.errors import UserError
from .corpus import Texts
from .permutation import stable_permutation
from .settings import DataSettings
from .stored import Documents

logger = logging.getLogger("inrank_dist")

#: The order of documents is the same for all runs. The order of samples is the loader's.
ORDER_SEED = 0


@dataclass(frozen=True)
class Corpus:
    """The text of a run. ``digest`` (hex) covers all of it, in order. ``in_both`` is the number and bytes of the
    validation documents that also occur in the training text."""

    train: Documents
    validation: Documents
    digest: str
    in_both: tuple[int, int]


def choose_documents(texts: Texts, data: DataSettings) -> Corpus:
    """Drop empty documents, hold out validation data, shuffle in a fixed order, and truncate to ``data.max_bytes``.

    Held out are the documents with the smallest hashes, until they reach ``data.validation_fraction`` of the bytes. The
    hash is of the document's name, or else of its text, so that copies stay together. A document larger than that share
    is held out only if all are. With ``data.validation_bytes`` larger ones are also held out where the others do not
    reach it, and the validation data is truncated to exactly that; what is cut off is not trained on either.

    Raises:
        UserError: there is no text, or too few documents to hold one out.
    """
    train, validation = texts.train, texts.validation
    for name, part in (("training", train), ("validation", validation)):
        if part is not None and not part.sizes.any():
            raise UserError(f"data.source {data.source} has no {name} text; write a source that has some")
    if validation is None:
        keys = train.digests if texts.names is None else np.stack([_sha256(name) for name in texts.names])
        share = data.validation_bytes or data.validation_fraction * train.sizes.sum()
        if share > 0.5 * train.sizes.sum():
            raise UserError(
                f"data.validation_bytes is {data.validation_bytes}, more than half of the {train.total_bytes} bytes of "
                "text; write less, or give more text"
            )
        count, total = len(train), train.sizes.sum()
        train, validation = _hold_out(train, keys, share, reach=data.validation_bytes is not None)
        held = validation.sizes.sum() / total
        if data.validation_bytes is None and not 0.5 < held / data.validation_fraction < 2:
            logger.warning(
                "warning: %.2g of the text is held out, and data.validation_fraction is %g: documents are held out "
                "whole, %d of %s here; data.validation_bytes: %d holds out exactly that many bytes",
                *(held, data.validation_fraction, len(validation), f"{count:,}", share),
            )
    parts = []
    for name, part in (("training", train), ("validation", validation)):
        part = part.take(np.flatnonzero(part.sizes))
        if not data.join_rows:
            part = part.take(stable_permutation(len(part), ORDER_SEED))
        caps = {"max_bytes": data.max_bytes}
        if name == "validation":
            caps["validation_bytes"] = data.validation_bytes
        for key, cap in caps.items():
            if cap is not None:
                part = _cap(part, cap)
                if not len(part):
                    raise UserError(f"data.{key} is {cap}, less than one character of the {name} text")
        parts.append(part)
    train, validation = parts
    digest = hashlib.sha256(train.digests.tobytes() + b"validation" + validation.digests.tobytes())
    # Joined rows are lines, and equal lines are common.
    in_both = (0, 0) if data.join_rows else _in_both(train, validation)
    return Corpus(train, validation, digest.hexdigest(), in_both)


def _in_both(train: Documents, validation: Documents) -> tuple[int, int]:
    """Number and bytes of validation documents that are also in ``train``."""
    known, held_out = (np.ascontiguousarray(part.digests).view("S32")[:, 0] for part in (train, validation))
    shared = np.isin(held_out, known)
    return int(shared.sum()), int(validation.sizes[shared].sum())


def _sha256(text: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint8)


def _hold_out(train: Documents, keys: np.ndarray, share: float, *, reach: bool = False) -> tuple[Documents, Documents]:
    """Hold out documents of ``share`` bytes or less each, until they reach ``share`` together.

    Args:
        keys: hashes (n, 32) uint8, in whose order documents are held out.
        reach: whether to add larger documents, the smallest first, where the others do not reach ``share``.
    """
    full = np.flatnonzero(train.sizes)
    # A single document larger than the whole share would make validation both too large and too uniform.
    eligible = full[train.sizes[full] <= share]
    if not len(eligible):
        eligible = full
    first_bytes = np.ascontiguousarray(keys).view(">u8")[:, 0]
    by_key = eligible[np.argsort(first_bytes[eligible], kind="stable")]
    if reach and train.sizes[eligible].sum() < share:
        larger = np.setdiff1d(full, eligible)
        by_key = np.concatenate([by_key, larger[np.argsort(train.sizes[larger], kind="stable")]])
    count = int(np.searchsorted(np.cumsum(train.sizes[by_key]), share)) + 1
    while count < len(by_key) and first_bytes[by_key[count]] == first_bytes[by_key[count - 1]]:
        count += 1
    held_out = by_key[:count]
    rest = np.setdiff1d(full, held_out)
    if not len(rest):
        raise UserError(
            f"the text has {len(np.unique(first_bytes[full]))} different documents, too few to hold one out; write "
            "data.validation_paths or data.validation_split, give more documents, or write data.document_separator if "
            "one file holds many"
        )
    return train.take(rest), train.take(held_out)


def _cap(part: Documents, max_bytes: int) -> Documents:
    """Truncate to ``max_bytes`` bytes. The last document is cut at a character."""
    ends = np.cumsum(part.sizes)
    whole = int(np.searchsorted(ends, max_bytes, side="right"))
    if whole == len(ends):
        return part
    room = max_bytes - (int(ends[whole - 1]) if whole else 0)
    cut = part.take(np.arange(whole + 1)).cut_last(room)
    return cut if cut.sizes[-1] else part.take(np.arange(whole))
