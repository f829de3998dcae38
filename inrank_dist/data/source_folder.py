"""Turns one source of text or tokens into a folder of packed tokens, once."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError
from ..runtime.files import make_once
from ..runtime.home import expand_home
from ..runtime.progress import phase
from .corpus import Source, open_source
from .documents import Corpus, choose_documents
from .hashing import Hashed, check_unchanged, hash_files
from .packing import Packed, pack
from .prepared import FORMAT_VERSION, Prepared, check_complete, open_folder, unreadable, write_documents, write_summary
from .settings import DataSettings, TokenizerSettings
from .stored import Documents
from .tokenizer import Tokenizer, train_tokenizer
from .tokens import companions, find_token_files, read_tokens

SCRATCH = "scratch"


def prepare_source(
    data: DataSettings, tokenizer: Tokenizer | TokenizerSettings, block_length: int, *, progress: bool
) -> Prepared:
    """Prepare one source, see ``prepare``.

    Args:
        tokenizer: a tokenizer, or the settings of one to train on the training text.
    """
    if data.source == "tokens":
        return _prepare_tokens(data, tokenizer, block_length, progress)
    source = open_source(data)
    folder = _folder(source.identity, data, tokenizer, block_length)

    def build(work: Path) -> None:
        corpus = read_corpus(data, work, progress, source)
        chosen = tokenizer
        if not isinstance(chosen, Tokenizer):
            chosen = train_on(corpus.train.heads(chosen.max_training_bytes), chosen, progress)
        _write_text(work, corpus, chosen, data, block_length, progress=progress)

    make_once(folder, build, check_complete)
    return open_folder(folder)


def check_source(data: DataSettings) -> None:
    """Find the files that ``data`` names, without reading text or writing anything. The hub is not asked.

    Raises:
        UserError: as ``prepare``.
    """
    if data.source == "tokens":
        _token_files(data, remember=False)
    elif data.source != "hub":
        open_source(data, remember=False)


def source_identity(data: DataSettings, *, remember: bool) -> str:
    """A hash (hex) of the content of a source. For ``remember`` see ``hash_files``.

    Raises:
        UserError: as ``prepare``.
    """
    if data.source == "tokens":
        return _token_files(data, remember=remember)[0]
    return open_source(data, remember=remember).identity


def find_source(data: DataSettings, tokenizer: Tokenizer | TokenizerSettings, block_length: int) -> Prepared | None:
    """The result of an earlier ``prepare_source``, or None. Writes nothing.

    Raises:
        UserError: as ``prepare``.
    """
    folder = _folder(source_identity(data, remember=False), data, tokenizer, block_length)
    return open_folder(folder, remember=False) if is_made(folder) else None


def is_made(folder: Path) -> bool:
    """Whether ``folder`` exists.

    Raises:
        UserError: that cannot be found out.
    """
    try:
        return folder.is_dir()
    except OSError as error:
        raise unreadable(folder, error) from error


def read_corpus(data: DataSettings, work: Path, progress: bool, source: Source | None = None) -> Corpus:
    """Read the text of a source into a folder in ``work``, and choose its documents.

    Raises:
        UserError: as ``prepare``.
    """
    (work / SCRATCH).mkdir()
    return choose_documents((source or open_source(data)).read(work / SCRATCH, progress), data)


def train_on(texts: Iterable[str], settings: TokenizerSettings, progress: bool) -> Tokenizer:
    """Train a tokenizer and show the progress.

    Raises:
        UserError: there is not enough text for the vocabulary.
    """
    with phase(f"training a {settings.kind} tokenizer of {settings.vocab_size} tokens", enabled=progress, patience=0):
        return train_tokenizer(texts, settings)


def _prepare_tokens(
    data: DataSettings, tokenizer: Tokenizer | TokenizerSettings, block_length: int, progress: bool
) -> Prepared:
    """Pack tokens that exist already."""
    if not isinstance(tokenizer, Tokenizer):
        raise UserError("data.source is tokens but tokenizer.path is null; write the tokenizer that made them")
    identity, hashes, files = _token_files(data, remember=True)
    folder = _folder(identity, data, tokenizer, block_length)

    def build(work: Path) -> None:
        packed = {}
        for name, paths in files.items():
            size = sum(path.stat().st_size for path in paths)
            with phase(f"packing the {name} tokens", size, unit="bytes", enabled=progress, patience=0) as advance:
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
        write_documents(work)
        facts = {"documents_in_both": (0, 0)}
        write_summary(work, packed, tokenizer, block_length, f"tokens {identity}", facts)

    make_once(folder, build, check_complete)
    return open_folder(folder)


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
        **corpus_key(identity, data),
        "tokenizer": tokenizer.fingerprint if isinstance(tokenizer, Tokenizer) else training_key(tokenizer),
        "block_length": block_length,
    }
    key = hashlib.sha256(json.dumps(key_fields, sort_keys=True).encode()).hexdigest()
    return expand_home(data.cache_dir, "data.cache_dir").absolute() / f"{data.source}-{key[:16]}"


def corpus_key(identity: str, data: DataSettings) -> dict[str, Any]:
    """All that determines the documents of a source and their order.

    Args:
        identity: of the text, see ``source_identity``.
    """
    by_fraction = not data.has_own_validation and data.validation_bytes is None
    key = {
        "format": FORMAT_VERSION,
        "source": data.source,
        "identity": identity,
        "document_separator": data.document_separator if data.source == "files" else None,
        "join_rows": data.join_rows,
        "validation_fraction": data.validation_fraction if by_fraction else None,
        "max_bytes": data.max_bytes,
    }
    # Added only if it is set, so that folders of earlier versions keep their names.
    return key if data.validation_bytes is None else key | {"validation_bytes": data.validation_bytes}


def training_key(settings: TokenizerSettings) -> dict[str, Any]:
    """The settings that determine a tokenizer that is trained on the text."""
    return {name: getattr(settings, name) for name in ("kind", "vocab_size", "path", "max_training_bytes")}


def _write_text(
    work: Path, corpus: Corpus, tokenizer: Tokenizer, data: DataSettings, block_length: int, *, progress: bool
) -> None:
    """Tokenise and pack a corpus in ``work``, see ``write_summary``."""
    packed: dict[str, Packed] = {}
    # In a single document the separator is only ever the last token, and nothing follows it.
    begin = data.join_rows or len(corpus.train) == 1
    irregular = False
    parts: dict[str, Documents] = {"train": corpus.train, "validation": corpus.validation}
    for name, documents in parts.items():
        with phase(f"tokenising {name}", documents.total_bytes, unit="bytes", enabled=progress, patience=0) as advance:
            encoding = tokenizer.encode_documents(
                (documents.pieces(index, advance) for index in range(len(documents))),
                separate=not data.join_rows,
                threads=data.num_workers or cpus(),
            )
            first = tokenizer.eos_id if begin else None
            packed[name] = pack(encoding, tokenizer.dtype, block_length, work / f"{name}.arrow", first=first)
            irregular = irregular or encoding.irregular
    shutil.rmtree(work / SCRATCH)
    write_documents(work, **({} if data.join_rows else parts))
    # If rows and cuts are as in format 2, so are the tokens, and checkpoints of that format can be resumed.
    tokens = f"3 {begin} {irregular}" if begin or irregular else "2"
    facts = {
        "train_bytes": corpus.train.total_bytes,
        "validation_bytes": corpus.validation.total_bytes,
        "validation_documents": len(corpus.validation),
        "documents_in_both": corpus.in_both,
    }
    write_summary(work, packed, tokenizer, block_length, f"{tokens} {corpus.digest}", facts)


def cpus() -> int:
    """Number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
