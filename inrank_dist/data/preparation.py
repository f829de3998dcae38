"""Turns text into a folder of packed tokens, once; every process then memory-maps it."""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from ..runtime.errors import UserError
from ..runtime.files import MARKER, make_once
from ..runtime.home import expand_home
from .corpus import open_source
from .documents import Corpus, choose_documents
from .hashing import Hashed, check_unchanged, hash_files
from .packing import Packed, pack, unigram_entropy
from .progress import phase, quiet_datasets
from .settings import DataSettings, TokenizerSettings
from .stored import Documents
from .tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from .tokens import companions, find_token_files, read_tokens

logger = logging.getLogger("inrank_dist")

#: Incremented whenever the same settings and text would be prepared differently; folders of older formats are ignored.
#: The fingerprint, which checkpoints store, changes only if the tokens do.
FORMAT_VERSION = 3

SCRATCH, SUMMARY, TOKENIZER = "scratch", "prepared.json", "tokenizer.model"
PARTS = ("train", "validation")
FILES = {MARKER, TOKENIZER, *(f"{part}.arrow" for part in PARTS)}


@dataclass(frozen=True)
class Prepared:
    """Packed tokens, ready for a ``Loader``.

    Rows of ``train`` and ``validation`` hold ``input_ids``, ``block_length + 1`` tokens. The last token of a row is the
    first of the next, so each row has ``block_length`` tokens to predict, and no token is predicted twice or skipped
    (except for fewer than ``block_length`` at the end). If no text follows a separator in the training text (joined
    rows, a single document), the first token of each row is replaced by the separator. The model thereby learns to
    begin with it, as ``generate`` does. ``train_tokens`` and ``validation_tokens`` count the tokens to predict.
    ``fingerprint`` (sha256, hex) covers the text, the tokenizer and the block length.

    ``unigram_entropy`` (nats per token) is the cross-entropy of the validation tokens under the frequencies of the
    training tokens, with add-one smoothing. It is the loss of a model that knows token frequencies but no context. A
    model that learns anything gets below it.
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


def prepare(
    data: DataSettings,
    tokenizer: TokenizerSettings,
    block_length: int,
    *,
    progress: bool = True,
    saved_tokenizer: Tokenizer | None = None,
) -> Prepared:
    """Tokenise and pack the text that ``data`` names, unless that has been done, and memory-map the result.

    The folder is named by a hash of the text and of every setting that changes the result, so an edited file or a new
    setting leads to a new folder. Any number of processes and jobs may call this at the same time: one prepares, the
    others wait (``files.make_once``). Text is hashed at every start, files of 16 MB or more only if their inode, size
    or times have changed. Text on the hub is assumed to be unchanged while its folder exists.

    Args:
        block_length: number of tokens to predict per row, the model's context length.
        progress: whether to show progress if this process does the work.
        saved_tokenizer: used if ``tokenizer.path`` no longer exists; the checkpoint's copy.

    Raises:
        UserError: a setting, file or folder cannot be used. Only the lock and the recorded error are left behind.
    """
    loaded = _given_tokenizer(tokenizer, saved_tokenizer)
    with quiet_datasets():
        if data.source == "tokens":
            return _prepare_tokens(data, loaded, block_length, progress)
        source = open_source(data)
        folder = _folder(source.identity, data, loaded or tokenizer, block_length)

        def build(work: Path) -> None:
            scratch = work / SCRATCH
            scratch.mkdir()
            corpus = choose_documents(source.read(scratch, progress), data)
            chosen = loaded or _train(corpus, tokenizer, progress)
            _write_text(work, corpus, chosen, data, block_length, progress=progress)

        make_once(folder, build, _check_complete)
        return _open_prepared(folder)


def check_source(data: DataSettings) -> None:
    """Find the files that ``data`` names, without reading text or writing anything. The hub is not asked.

    Raises:
        UserError: as ``prepare``.
    """
    if data.source == "tokens":
        _token_files(data, remember=False)
    elif data.source != "hub":
        open_source(data, remember=False)


def find_prepared(
    data: DataSettings, tokenizer: TokenizerSettings, block_length: int, *, saved_tokenizer: Tokenizer | None = None
) -> Prepared | None:
    """The result of an earlier ``prepare``, or None. Writes nothing.

    Raises:
        UserError: as ``prepare``.
    """
    loaded = _given_tokenizer(tokenizer, saved_tokenizer)
    if data.source == "tokens":
        identity = _token_files(data, remember=False)[0]
    else:
        identity = open_source(data, remember=False).identity
    folder = _folder(identity, data, loaded or tokenizer, block_length)
    try:
        found = folder.is_dir()
    except OSError as error:
        raise _unreadable(folder, error) from error
    return _open_prepared(folder, remember=False) if found else None


def _given_tokenizer(settings: TokenizerSettings, saved: Tokenizer | None) -> Tokenizer | None:
    if settings.path is None:
        return None
    if saved is not None and not os.path.lexists(os.path.expanduser(settings.path)):
        logger.info("tokenizer.path %s is not there; the checkpoint's own copy is used", settings.path)
        return saved
    return load_tokenizer(settings)


def _prepare_tokens(data: DataSettings, tokenizer: Tokenizer | None, block_length: int, progress: bool) -> Prepared:
    """Pack tokens that exist already."""
    if tokenizer is None:
        raise UserError("data.source is tokens but tokenizer.path is null; write the tokenizer that made them")
    identity, hashes, files = _token_files(data, remember=True)
    folder = _folder(identity, data, tokenizer, block_length)

    def build(work: Path) -> None:
        packed = {}
        for name, paths in files.items():
            size = sum(path.stat().st_size for path in paths)
            with phase(f"packing the {name} tokens", size, enabled=progress) as advance:
                tokens = read_tokens(
                    paths,
                    dtype=data.token_dtype,
                    eos_id=tokenizer.eos_id,
                    vocab_size=tokenizer.vocab_size,
                    advance=advance,
                )
                stream = (each.astype(tokenizer.dtype) for each in tokens)
                packed[name] = pack(stream, tokenizer.dtype, block_length, work / f"{name}.arrow")
        check_unchanged(hashes)
        facts = {"documents_in_both": (0, 0)}
        _finish(work, packed, tokenizer, block_length, f"tokens {identity}", facts)

    make_once(folder, build, _check_complete)
    return _open_prepared(folder)


def _token_files(data: DataSettings, *, remember: bool) -> tuple[str, dict[Path, Hashed], dict[str, list[Path]]]:
    """Identity (hex) of the tokens, the hashes of all files, and the files of each part."""
    files = {
        "train": find_token_files("paths", data.paths),
        "validation": find_token_files("validation_paths", data.validation_paths),
    }
    if same := set(map(os.path.realpath, files["train"])) & set(map(os.path.realpath, files["validation"])):
        raise UserError(
            f"data.paths and data.validation_paths both match {min(same)}; write globs without a common file"
        )
    paths = [*files["train"], *files["validation"]]
    every = [*paths, *companions(paths)]
    hashes = hash_files(every, expand_home(data.cache_dir, "data.cache_dir"), remember=remember)
    what = [[[path.suffix, hashes[path].sha256] for path in [*part, *companions(part)]] for part in files.values()]
    return hashlib.sha256(json.dumps([what, data.token_dtype]).encode()).hexdigest(), hashes, files


def _folder(identity: str, data: DataSettings, tokenizer: Tokenizer | TokenizerSettings, block_length: int) -> Path:
    key_fields = {
        "format": FORMAT_VERSION,
        "source": data.source,
        "identity": identity,
        "document_separator": data.document_separator if data.source == "files" else None,
        "join_rows": data.join_rows,
        "validation_fraction": None if data.has_own_validation else data.validation_fraction,
        "max_bytes": data.max_bytes,
        "tokenizer": tokenizer.fingerprint if isinstance(tokenizer, Tokenizer) else _training_key(tokenizer),
        "block_length": block_length,
    }
    key = hashlib.sha256(json.dumps(key_fields, sort_keys=True).encode()).hexdigest()
    return expand_home(data.cache_dir, "data.cache_dir").absolute() / f"{data.source}-{key[:16]}"


def _training_key(settings: TokenizerSettings) -> dict[str, Any]:
    """The settings that determine a tokenizer that is trained on the text."""
    return {name: getattr(settings, name) for name in ("kind", "vocab_size", "path", "max_training_bytes")}


def _train(corpus: Corpus, settings: TokenizerSettings, progress: bool) -> Tokenizer:
    title = f"training a {settings.kind} tokenizer of {settings.vocab_size} tokens"
    with phase(title, None, enabled=progress):
        return train_tokenizer(corpus.train.heads(settings.max_training_bytes), settings)


def _write_text(
    work: Path, corpus: Corpus, tokenizer: Tokenizer, data: DataSettings, block_length: int, *, progress: bool
) -> None:
    """Tokenise and pack a corpus in ``work``, see ``_finish``."""
    packed: dict[str, Packed] = {}
    # In a single document the separator is only ever the last token, and nothing follows it.
    begin = data.join_rows or len(corpus.train) == 1
    irregular = False
    parts: dict[str, Documents] = {"train": corpus.train, "validation": corpus.validation}
    for name, documents in parts.items():
        with phase(f"tokenising {name}", documents.total_bytes, enabled=progress) as advance:
            encoding = tokenizer.encode_documents(
                (documents.pieces(index, advance) for index in range(len(documents))),
                separate=not data.join_rows,
                threads=data.num_workers or _cpus(),
            )
            first = tokenizer.eos_id if begin else None
            packed[name] = pack(encoding, tokenizer.dtype, block_length, work / f"{name}.arrow", first=first)
            irregular = irregular or encoding.irregular
    shutil.rmtree(work / SCRATCH)
    # If rows and cuts are as in format 2, so are the tokens, and checkpoints of that format can be resumed.
    tokens = f"3 {begin} {irregular}" if begin or irregular else "2"
    facts = {
        "train_bytes": corpus.train.total_bytes,
        "validation_bytes": corpus.validation.total_bytes,
        "validation_documents": len(corpus.validation),
        "documents_in_both": corpus.in_both,
    }
    _finish(work, packed, tokenizer, block_length, f"{tokens} {corpus.digest}", facts)


def _finish(
    work: Path,
    packed: dict[str, Packed],
    tokenizer: Tokenizer,
    block_length: int,
    contents: str,
    facts: dict[str, Any],
) -> None:
    """Complete ``work``, which holds train.arrow and validation.arrow: add tokenizer.model, and prepared.json with a
    hash of each file.

    Args:
        packed: rows, and the count of each token, of both parts.
        contents: identifies the tokens.
        facts: further entries of prepared.json.
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
        "unigram_entropy": unigram_entropy(train_counts, validation_counts, tokenizer.vocab_size),
        **facts,
        "tokenizer": tokenizer.fingerprint,
        "files": {path.name: hashed.sha256 for path, hashed in hashes.items()},
        "sizes": {path.name: path.stat().st_size for path in hashes},
    }
    (work / SUMMARY).write_text(json.dumps(summary, indent=1))


def _cpus() -> int:
    """Number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_complete(work: Path) -> None:
    """Check that the files are as written: anyone with access to the cache could have removed them.

    Raises:
        OSError: a file is missing or has another size.
    """
    sizes = json.loads((work / SUMMARY).read_text())["sizes"]
    for name in FILES:
        if (work / name).stat().st_size != sizes[name]:
            raise OSError(f"{name} is not as it was written")


def _open_prepared(folder: Path, *, remember: bool = True) -> Prepared:
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
        )
    except PermissionError as error:
        raise _unreadable(folder, error) from error
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder} is damaged ({' '.join(str(error).split())}); {advice}") from error


def _unreadable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"data.cache_dir is {folder.parent}, and {folder} cannot be read ({error.strerror}); write a folder of your own"
    )
