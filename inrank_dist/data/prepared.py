"""Prepared data: the folder of packed tokens of one source, and mixtures of such folders."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from ..runtime.errors import UserError
from ..runtime.files import MARKER
from .hashing import hash_files
from .packing import Packed, unigram_entropy
from .stored import Documents
from .tokenizer import Tokenizer

logger = logging.getLogger("inrank_dist")

#: Incremented whenever the same settings and text would be prepared differently; folders of older formats are ignored.
#: The fingerprint, which checkpoints store, changes only if the tokens do.
FORMAT_VERSION = 4

SUMMARY, TOKENIZER, DOCUMENTS = "prepared.json", "tokenizer.model", "documents.npz"
PARTS = ("train", "validation")
FILES = {MARKER, TOKENIZER, DOCUMENTS, *(f"{part}.arrow" for part in PARTS)}


@dataclass(frozen=True)
class Source:
    """A source of a mixture.

    Attributes:
        label: name of the source.
        share: share of the training rows to take from it; those of all sources add up to 1.
        data: its prepared data.
    """

    label: str
    share: float
    data: "Prepared"


@dataclass(frozen=True)
class Prepared:
    """Packed tokens, ready for a ``Loader``.

    Rows of ``train`` and ``validation`` hold ``input_ids``, ``block_length + 1`` tokens. The last token of a row is the
    first of the next, so each row has ``block_length`` tokens to predict, and no token is predicted twice or skipped
    (except for fewer than ``block_length`` at the end). If no text follows a separator in the training text (joined
    rows, a single document), the first token of each row is replaced by the separator. The model thereby learns to
    begin with it, as ``generate`` does. ``train_tokens`` and ``validation_tokens`` count the tokens to predict.
    ``fingerprint`` (sha256, hex) covers the text, the tokenizer and the block length, and the weights of a mixture.

    ``unigram_entropy`` (nats per token) is the cross-entropy of the validation tokens under the frequencies of the
    training tokens, with add-one smoothing. It is the loss of a model that knows token frequencies but no context. A
    model that learns anything gets below it. For a mixture it is the weighted mean over the sources.

    ``bytes_per_token`` is the mean number of UTF-8 bytes of the validation text per token, separators included, and for
    a mixture the weighted mean over the sources. None if it is unknown: the source has tokens and no text, or it was
    prepared by a version that did not count its tokens.

    ``sources`` are the sources of a mixture, whose rows follow each other in ``train`` and ``validation``. Otherwise it
    is empty. ``folder`` of a mixture is the folder that contains those of the sources.
    """

    folder: Path
    train: Dataset
    validation: Dataset
    tokenizer: Tokenizer
    fingerprint: str
    block_length: int
    train_tokens: int
    validation_tokens: int
    unigram_entropy: float
    bytes_per_token: float | None = None
    sources: tuple[Source, ...] = ()

    @property
    def parts(self) -> tuple[Source, ...]:
        """The sources of a mixture, or these data as the only source."""
        return self.sources or (Source("", 1.0, self),)


def mix(sources: Sequence[Source]) -> Prepared:
    """Combine prepared data of one tokenizer and block length to a mixture."""
    parts = [source.data for source in sources]
    first, bytes_per_token = parts[0], [part.bytes_per_token for part in parts]
    _warn_of_leaks(sources)
    what = json.dumps([[source.data.fingerprint, source.share] for source in sources])
    return Prepared(
        folder=first.folder.parent,
        train=concatenate_datasets([part.train for part in parts]),
        validation=concatenate_datasets([part.validation for part in parts]),
        tokenizer=first.tokenizer,
        fingerprint=hashlib.sha256(f"mixture {what}".encode()).hexdigest(),
        block_length=first.block_length,
        train_tokens=sum(part.train_tokens for part in parts),
        validation_tokens=sum(part.validation_tokens for part in parts),
        unigram_entropy=sum(source.share * source.data.unigram_entropy for source in sources),
        bytes_per_token=None
        if None in bytes_per_token
        else sum(source.share * (size or 0.0) for source, size in zip(sources, bytes_per_token, strict=True)),
        sources=tuple(sources),
    )


def _warn_of_leaks(sources: Sequence[Source]) -> None:
    """Warn if validation documents of one source are in the training text of another."""
    documents = {}
    for source in sources:
        with np.load(source.data.folder / DOCUMENTS, allow_pickle=False) as stored:
            documents[source.label] = {name: stored[name] for name in stored.files}
    for label, held_out in documents.items():
        for other, trained in documents.items():
            shared = np.isin(held_out["validation"], trained["train"])
            if other != label and shared.any():
                logger.warning(
                    "warning: %s of %s validation documents (%.1f%% of the bytes) of source %s are in the training "
                    "text of source %s, so its validation loss is too low",
                    *(f"{int(shared.sum()):,}", f"{len(shared):,}"),
                    100 * held_out["sizes"][shared].sum() / held_out["sizes"].sum(),
                    *(label, other),
                )


def write_documents(work: Path, train: Documents | None = None, validation: Documents | None = None) -> None:
    """Write the first 8 bytes of the hashes of all documents, by which those of other sources are recognised.

    Without documents (tokens, joined rows) the file is empty.
    """
    hashes = {
        name: np.zeros(0, ">u8") if part is None else np.ascontiguousarray(part.digests).view(">u8")[:, 0]
        for name, part in (("train", train), ("validation", validation))
    }
    sizes = np.zeros(0, np.int64) if validation is None else validation.sizes
    np.savez(work / DOCUMENTS, train=hashes["train"], validation=hashes["validation"], sizes=sizes)


def write_summary(
    work: Path,
    packed: dict[str, Packed],
    tokenizer: Tokenizer,
    block_length: int,
    contents: str,
    facts: dict[str, Any],
) -> None:
    """Complete ``work``, which holds train.arrow, validation.arrow and documents.npz: add tokenizer.model, and
    prepared.json with a hash of each file.

    Args:
        packed: rows, and the count of each token, of both parts.
        contents: identifies the tokens.
        facts: further entries of prepared.json.

    Raises:
        UserError: a part has fewer tokens than one row.
    """
    for name, (rows, counts) in packed.items():
        if not rows:
            raise UserError(
                f"the {name} text has {counts.sum()} tokens and a row takes {block_length + 1}"
                f" (model.max_seq_len + 1); give more text or write a smaller model.max_seq_len"
            )
    tokenizer.save(work / TOKENIZER)
    fingerprint = f"{contents} {tokenizer.fingerprint} {block_length}"
    hashes = hash_files([work / name for name in sorted(FILES)], work.parent, remember=False)
    (train_rows, train_counts), (validation_rows, validation_counts) = (packed[part] for part in PARTS)
    summary = {
        "format": FORMAT_VERSION,
        "fingerprint": hashlib.sha256(fingerprint.encode()).hexdigest(),
        "block_length": block_length,
        "train_tokens": train_rows * block_length,
        "validation_tokens": validation_rows * block_length,
        "validation_text_tokens": int(validation_counts.sum()),  # including those that fill no row
        "unigram_entropy": unigram_entropy(train_counts, validation_counts, tokenizer.vocab_size),
        **facts,
        "tokenizer": tokenizer.fingerprint,
        "files": {path.name: hashed.sha256 for path, hashed in hashes.items()},
        "sizes": {path.name: path.stat().st_size for path in hashes},
    }
    (work / SUMMARY).write_text(json.dumps(summary, indent=1))


def check_complete(work: Path) -> None:
    """Check that the files are as written: anyone with access to the cache could have removed them.

    Raises:
        OSError: a file is missing or has another size.
    """
    sizes = json.loads((work / SUMMARY).read_text())["sizes"]
    for name in FILES:
        if (work / name).stat().st_size != sizes[name]:
            raise OSError(f"{name} is not as it was written")


def open_folder(folder: Path, *, remember: bool = True) -> Prepared:
    advice = "delete this folder and it is prepared again"
    try:
        summary = json.loads((folder / SUMMARY).read_text())
        files = [folder / name for name in sorted(FILES)]
        hashes = hash_files([path for path in files if path.exists()], folder.parent, remember=remember)
        for path in files:
            if path not in hashes or hashes[path].sha256 != summary["files"][path.name]:
                raise UserError(f"{path} is not as it was written; {advice}")
        shared, shared_bytes = summary["documents_in_both"]
        if shared:
            logger.warning(
                "warning: %s of %s validation documents (%.1f%% of the bytes) are in the training text as well",
                *(f"{shared:,}", f"{summary['validation_documents']:,}"),
                100 * shared_bytes / summary["validation_bytes"],
            )
        return Prepared(
            folder=folder,
            train=Dataset.from_file(str(folder / "train.arrow")),
            validation=Dataset.from_file(str(folder / "validation.arrow")),
            tokenizer=Tokenizer.load(folder / TOKENIZER),
            fingerprint=summary["fingerprint"],
            block_length=summary["block_length"],
            train_tokens=summary["train_tokens"],
            validation_tokens=summary["validation_tokens"],
            unigram_entropy=summary["unigram_entropy"],
            bytes_per_token=summary["validation_bytes"] / summary["validation_text_tokens"]
            if {"validation_bytes", "validation_text_tokens"} <= summary.keys()
            else None,
        )
    except PermissionError as error:
        raise unreadable(folder, error) from error
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder} is damaged ({' '.join(str(error).split())}); {advice}") from error


def unreadable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"data.cache_dir is {folder.parent}, and {folder} cannot be read ({error.strerror}); write a folder of your own"
    )
