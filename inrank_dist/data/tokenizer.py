"""Lossless tokenisation with SentencePiece."""

import functools
import hashlib
import io
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from ..runtime.errors import UserError
from ..runtime.files import write_atomically
from ..runtime.home import expand_home, searched
from .parts import META_SPACE, Cutter, neighbours
from .settings import MIN_VOCABULARY, TokenizerSettings

log = logging.getLogger("inrank_dist")

#: The piece between documents. The same characters in a text are encoded as ordinary text, never as this token.
SEPARATOR = "<|endoftext|>"

#: Characters to encode at a time per thread. Bounds the number of tokens held as Python lists.
BATCH_CHARACTERS = 1 << 18

#: Characters that no piece may contain; they are encoded as byte pieces. SentencePiece uses three of them as marks, and
#: excluding line ends keeps pieces within lines.
NOT_IN_PIECES = re.compile("[\x00-\x1f\x7f\u2581\u2585]+")

#: Bytes of a tokenizer's file. A ``tokenizer.json`` of 256,000 tokens has about 30 MB.
LARGEST = 256 << 20

#: Longest line to train on, in characters. SentencePiece would drop longer lines entirely.
LINE_CHARACTERS = 2000

#: Text that any normalization would change; includes compatibility forms and a decomposed character.
PROBE = (
    f"  two spaces\n\ttab, \u00e9, e\u0301, \ufb01 \u2460 \uff21 \u212b \u00a0 \u3000 \u00ad A\r\n\U0001f600, \x00"
    f" {META_SPACE} end "
)


class Tokenizer:
    """A SentencePiece model for which ``decode(encode(text)) == text`` for every text.

    ``vocab_size`` counts all ids. ``eos_id`` separates documents. ``fingerprint`` is the sha256 (hex) of the model.
    """

    def __init__(self, model: bytes) -> None:
        self._keep(model)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.get_piece_size()
        self.eos_id: int = self._processor.eos_id()

    def _keep(self, model: bytes) -> None:
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return type(self), (self.model,)

    def encode(self, text: str) -> list[int]:
        """Encode ``text`` without adding a separator.

        Raises:
            UserError: the text contains a lone surrogate, half of a character.
        """
        refuse_surrogates(text)
        return [token for ids in self.encode_documents([[text]]) for token in ids.tolist()]

    def encode_documents(
        self, documents: Iterable[Iterable[str]], *, separate: bool = False, threads: int = 1
    ) -> "Encoded":
        """Encode documents that arrive in chunks of text, in memory that does not depend on their size.

        Args:
            separate: whether to append the separator to each document.
            threads: number of encoding threads. Does not change the ids.
        """
        return Encoding(self, documents, separate=separate, threads=threads)

    @property
    def dtype(self) -> np.dtype:
        """The smallest dtype used for packed data that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.int32)

    @property
    def eos_piece(self) -> str:
        """The separator as it is written in the vocabulary."""
        return self._processor.id_to_piece(self.eos_id)

    @functools.cached_property
    def neighbours(self) -> frozenset[str]:
        """Pairs of adjacent characters within a piece of the vocabulary."""
        return neighbours(self._processor.id_to_piece(index) for index in range(self.vocab_size))

    def encode_parts(self, parts: list[str], threads: int) -> list[list[int]]:
        """Ids of each text. No text may contain ``META_SPACE``."""
        return self._processor.encode(parts, num_threads=threads) if parts else []

    @functools.cached_property
    def meta_space(self) -> list[int]:
        """Ids of ``META_SPACE``."""
        return [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in META_SPACE.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ``ids``. Separators are dropped, and bytes that are not valid UTF-8 become U+FFFD."""
        return self._processor.decode(list(ids))

    def save(self, path: Path | str) -> None:
        """Write the model file atomically."""
        write_atomically(Path(path), self.model)

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a model file that ``save`` wrote, or a SentencePiece model.

        Raises:
            UserError: the file does not exist or is not such a model.
        """
        from . import whole_documents

        try:
            file = expand_home(path, "tokenizer.path")
            refuse_large(file)
            model = file.read_bytes()
            if model.startswith(b"{"):
                return whole_documents.HuggingFaceTokenizer(model)
            tokenizer = Tokenizer(model)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"tokenizer {path} is damaged ({error}); write the path of a model file") from error
        except OSError as error:
            raise UserError(
                f"tokenizer {path}{searched(path)} cannot be read ({error.strerror}); write the path of a model file"
            ) from error
        except RuntimeError as error:
            raise UserError(f"tokenizer {path} is not a SentencePiece model; write the path of one") from error
        if tokenizer.eos_id < 0:
            raise UserError(f"tokenizer {path} has no end-of-sentence piece to separate documents; write another")
        if tokenizer.decode(tokenizer.encode(PROBE)) != PROBE:
            return whole_documents.LossySentencePiece(model)
        return tokenizer


def refuse_large(path: Path) -> None:
    """Raise ``UserError`` if a tokenizer's file is too large to be one."""
    if path.stat().st_size > LARGEST:
        raise UserError(f"tokenizer {path} is larger than {LARGEST >> 20} MiB; write the path of a tokenizer")


def refuse_surrogates(text: str) -> None:
    """Raise ``UserError`` if a text contains a lone surrogate, half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not Unicode at character {error.start} ({error.reason})") from error


class Encoded(Protocol):
    """The ids of documents.

    Attributes:
        irregular: whether, after the iteration, a document was cut elsewhere than at a line end.
    """

    @property
    def irregular(self) -> bool: ...

    def __iter__(self) -> Iterator[np.ndarray]: ...


class Encoding(Iterable[np.ndarray]):
    """The ids of documents as a sequence of arrays. Can be iterated only once.

    Attributes:
        cutter: afterwards tells how the text was cut.
    """

    def __init__(
        self, tokenizer: Tokenizer, documents: Iterable[Iterable[str]], *, separate: bool, threads: int
    ) -> None:
        self.cutter = Cutter(tokenizer.neighbours)
        self._tokenizer, self._documents, self._threads = tokenizer, documents, threads
        self._end = [tokenizer.eos_id] if separate else []
        self._parts: list[str] = []
        # None is a placeholder for the ids of the next part.
        self._ids: list[list[int] | None] = []
        self._characters = 0

    @property
    def irregular(self) -> bool:
        return self.cutter.irregular

    def __iter__(self) -> Iterator[np.ndarray]:
        for document in self._documents:
            for part in self.cutter.parts(document):
                if part == META_SPACE:
                    self._ids.append(self._tokenizer.meta_space)
                else:
                    self._parts.append(part)
                    self._ids.append(None)
                self._characters += len(part)
                if self._characters >= BATCH_CHARACTERS * self._threads:
                    yield self._flush()
            self._ids.append(self._end)
            self._characters += 1
        if self._ids:
            yield self._flush()

    def _flush(self) -> np.ndarray:
        encoded = iter(self._tokenizer.encode_parts(self._parts, self._threads))
        ids = chain.from_iterable(next(encoded) if ids is None else ids for ids in self._ids)
        result = np.fromiter(ids, dtype=self._tokenizer.dtype)
        self._parts, self._ids, self._characters = [], [], 0
        return result


def load_tokenizer(settings: TokenizerSettings) -> Tokenizer:
    """Load the tokenizer at ``settings.path``.

    Raises:
        UserError: the file cannot be used, or its vocabulary size is not ``settings.vocab_size``.
    """
    assert settings.path is not None
    path = expand_home(settings.path, "tokenizer.path")
    if settings.pattern and path.suffix != ".tiktoken":
        raise UserError(
            f"tokenizer.pattern is {settings.pattern} but {settings.path} is not a .tiktoken file; leave pattern out"
        )
    if path.is_dir() or path.suffix in (".json", ".tiktoken"):
        from .whole_documents import read_hugging_face

        tokenizer: Tokenizer = read_hugging_face(
            path, settings.eos_token, settings.special_tokens_in_text, settings.pattern
        )
    else:
        tokenizer = Tokenizer.load(settings.path)
        for key, value in (
            ("eos_token", settings.eos_token),
            ("special_tokens_in_text", settings.special_tokens_in_text),
        ):
            if value:
                raise UserError(
                    f"tokenizer.{key} is {value} but {settings.path} names its own special tokens; leave {key} out"
                )
    try:
        exact = tokenizer.decode(tokenizer.encode(PROBE)) == PROBE
    except ValueError as error:
        raise UserError(f"tokenizer {path} cannot encode text ({error}); write the path of another") from None
    if not exact:
        log.info("%s does not preserve all text: what it normalizes is not in the training text", settings.path)
    if tokenizer.vocab_size != settings.vocab_size:
        raise UserError(
            f"tokenizer.vocab_size is {settings.vocab_size}, but {settings.path} has"
            f" {tokenizer.vocab_size} tokens; write tokenizer.vocab_size: {tokenizer.vocab_size}"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], settings: TokenizerSettings) -> Tokenizer:
    """Train on the first ``settings.max_training_bytes`` of ``texts``. Deterministic.

    Raises:
        UserError: the text is too small for the vocabulary, or its characters do not fit into it.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts, settings.max_training_bytes),
            model_writer=model,
            model_type=settings.kind,
            vocab_size=settings.vocab_size,
            byte_fallback=True,
            # Encode rarer characters as bytes. With 1.0 a corpus's rare characters would fill a small vocabulary.
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # Encode indentation in few tokens.
            allow_whitespace_only_pieces=True,
            eos_id=0,
            eos_piece=SEPARATOR,
            unk_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * LINE_CHARACTERS,
            # Unigram sums floats per thread, so the number of threads affects the result.
            num_threads=4,
            minloglevel=4,
        )
    except RuntimeError as error:
        raise _training_error(settings, str(error)) from error
    return Tokenizer(model.getvalue())


def _training_error(settings: TokenizerSettings, reason: str) -> UserError:
    if found := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", reason):
        smaller = f"write at most {found[1]}, or " if int(found[1]) >= MIN_VOCABULARY else ""
        return UserError(
            f"tokenizer.vocab_size is {settings.vocab_size}, more than the training text can fill"
            f"; {smaller}give more text"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason):
        return UserError(
            f"tokenizer.vocab_size is {settings.vocab_size}, too small for the characters of the training"
            f" text; write at least {found[1]}"
        )
    if "sentences_.empty()" in reason or "all_chars_count" in reason:
        return UserError("the training text holds nothing but white space; give text to train a tokenizer on")
    last = reason.rpartition("] ")[2] or reason
    return UserError(f"SentencePiece cannot train a tokenizer of this text with these tokenizer settings: {last}")


def _training_lines(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for text in texts:
        content = text.encode()[:left]
        left -= len(content)
        for line in NOT_IN_PIECES.split(content.decode(errors="ignore")):
            for start in range(0, len(line), LINE_CHARACTERS):
                yield line[start : start + LINE_CHARACTERS]
        if left <= 0:
            return
