"""Turns text into folders of packed tokens, once; every process then memory-maps them."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets

from ..runtime.errors import UserError
from ..runtime.files import make_once
from ..runtime.home import expand_home
from . import source_folder
from .prepared import FORMAT_VERSION, TOKENIZER, Prepared, Source, mix
from .settings import DataSettings, SourceShare, TokenizerSettings
from .tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger("inrank_dist")


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
    setting leads to a new folder. Each source of a mixture has a folder of its own, which does not depend on the
    weights unless a tokenizer is trained. Any number of processes and jobs may call this at the same time: one
    prepares, the others wait (``files.make_once``). Text is hashed at every start, files of 16 MB or more only if their
    inode, size or times have changed. Text on the hub is assumed to be unchanged while its folder exists.

    Args:
        block_length: number of tokens to predict per row, the model's context length.
        progress: whether to show progress if this process does the work.
        saved_tokenizer: used if ``tokenizer.path`` no longer exists; the checkpoint's copy.

    Raises:
        UserError: a setting, file or folder cannot be used. Only the lock and the recorded error are left behind.
    """
    chosen = _given_tokenizer(tokenizer, saved_tokenizer)
    with _quiet_datasets():
        if data.source != "mixture":
            return source_folder.prepare_source(data, chosen, block_length, progress=progress)
        if not isinstance(chosen, Tokenizer):
            chosen = _tokenizer_of_mixture(data, chosen, progress)
        sources = []
        for source in data.mixture:
            with _named(source):
                prepared = source_folder.prepare_source(source.data, chosen, block_length, progress=progress)
            sources.append(Source(source.label, source.share, prepared))
        return mix(sources)


def check_source(data: DataSettings) -> None:
    """Find the files that ``data`` names, without reading text or writing anything. The hub is not asked.

    Raises:
        UserError: as ``prepare``.
    """
    if data.source != "mixture":
        source_folder.check_source(data)
    for source in data.mixture:
        with _named(source):
            source_folder.check_source(source.data)


def find_prepared(
    data: DataSettings, tokenizer: TokenizerSettings, block_length: int, *, saved_tokenizer: Tokenizer | None = None
) -> Prepared | None:
    """The result of an earlier ``prepare``, or None. Writes nothing.

    Raises:
        UserError: as ``prepare``.
    """
    chosen = _given_tokenizer(tokenizer, saved_tokenizer)
    if data.source != "mixture":
        return source_folder.find_source(data, chosen, block_length)
    if not isinstance(chosen, Tokenizer):
        folder = _tokenizer_folder(data, chosen, remember=False)
        if not source_folder.is_made(folder):
            return None
        chosen = Tokenizer.load(folder / TOKENIZER)
    sources = []
    for source in data.mixture:
        with _named(source):
            prepared = source_folder.find_source(source.data, chosen, block_length)
        if prepared is None:
            return None
        sources.append(Source(source.label, source.share, prepared))
    return mix(sources)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Disable the progress bars of ``datasets``, which are printed even if stderr is a file."""
    enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()


@contextmanager
def _named(source: SourceShare) -> Iterator[None]:
    """Say in errors which source of a mixture they are about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"in source {source.label} of data.sources: {error}") from error


def _given_tokenizer(settings: TokenizerSettings, saved: Tokenizer | None) -> Tokenizer | TokenizerSettings:
    """The tokenizer that ``settings`` name, or else ``settings``."""
    if settings.path is None:
        return settings
    if saved is not None and not os.path.lexists(os.path.expanduser(settings.path)):
        logger.info("tokenizer.path %s is not there; the checkpoint's own copy is used", settings.path)
        return saved
    return load_tokenizer(settings)


def _tokenizer_of_mixture(data: DataSettings, settings: TokenizerSettings, progress: bool) -> Tokenizer:
    """Train a tokenizer, unless that has been done. Each source contributes text in proportion to its share."""
    for source in data.mixture:
        if source.data.source == "tokens":
            raise UserError(
                f"source {source.label} of data.sources has tokens but tokenizer.path is null; write the tokenizer "
                "that made them"
            )
    folder = _tokenizer_folder(data, settings, remember=True)

    def build(work: Path) -> None:
        texts: list[str] = []
        for source in data.mixture:
            with _named(source):
                corpus = source_folder.read_corpus(source.data, work, progress)
                texts += corpus.train.heads(int(settings.max_training_bytes * source.share))
            shutil.rmtree(work / source_folder.SCRATCH)
        source_folder.train_on(texts, settings, progress).save(work / TOKENIZER)

    make_once(folder, build, _check_tokenizer)
    return Tokenizer.load(folder / TOKENIZER)


def _check_tokenizer(work: Path) -> None:
    Tokenizer.load(work / TOKENIZER)


def _tokenizer_folder(data: DataSettings, settings: TokenizerSettings, *, remember: bool) -> Path:
    """The folder of the tokenizer that is trained on a mixture."""
    sources = []
    for source in data.mixture:
        with _named(source):
            identity = source_folder.source_identity(source.data, remember=remember)
        sources.append([source_folder.corpus_key(identity, source.data), source.share])
    key = json.dumps([FORMAT_VERSION, sources, source_folder.training_key(settings)], sort_keys=True)
    name = f"tokenizer-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    return expand_home(data.cache_dir, "data.cache_dir").absolute() / name
