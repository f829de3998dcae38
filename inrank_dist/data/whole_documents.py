"""Tokenizers that encode each document as a whole: those of Hugging Face, and SentencePiece models of others."""

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import UserError, install
from ..runtime.json_file import read_json
from . import tiktoken_ranks
from .tokenizer import BATCH_CHARACTERS, LARGEST, Tokenizer, refuse_large, refuse_surrogates

#: End-of-document tokens to look for in a ``tokenizer.json`` that comes without a ``tokenizer_config.json``.
KNOWN_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>")


class WholeDocumentTokenizer(Tokenizer):
    """A tokenizer whose tokens may depend on text anywhere in the document, so documents are not cut into parts."""

    def encode(self, text: str) -> list[int]:
        refuse_surrogates(text)
        return self.encode_whole([text], 1)[0]

    def encode_whole(self, texts: list[str], threads: int) -> list[list[int]]:
        """Return the ids of each text."""
        raise NotImplementedError

    def encode_documents(
        self, documents: Iterable[Iterable[str]], *, separate: bool = False, threads: int = 1
    ) -> "WholeEncoding":
        """As ``Tokenizer.encode_documents``, in memory that grows with the largest document."""
        return WholeEncoding(self, documents, separate=separate, threads=threads)


class WholeEncoding(Iterable[np.ndarray]):
    """The ids of documents as a sequence of arrays. Can be iterated only once."""

    irregular = False

    def __init__(
        self, tokenizer: WholeDocumentTokenizer, documents: Iterable[Iterable[str]], *, separate: bool, threads: int
    ) -> None:
        self._tokenizer, self._documents, self._threads = tokenizer, documents, threads
        self._end = [tokenizer.eos_id] if separate else []

    def __iter__(self) -> Iterator[np.ndarray]:
        texts: list[str] = []
        characters = 0
        for document in self._documents:
            texts.append("".join(document))
            characters += len(texts[-1])
            if characters >= BATCH_CHARACTERS * self._threads:
                yield self._encode(texts)
                texts, characters = [], 0
        if texts:
            yield self._encode(texts)

    def _encode(self, texts: list[str]) -> np.ndarray:
        encoded = self._tokenizer.encode_whole(texts, self._threads)
        ids = chain.from_iterable(chain(each, self._end) for each in encoded)
        return np.fromiter(ids, dtype=self._tokenizer.dtype)


class LossySentencePiece(WholeDocumentTokenizer):
    """A SentencePiece model that normalizes text, such as one that inserts a space at the start."""

    def encode_whole(self, texts: list[str], threads: int) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=threads) if texts else []


class HuggingFaceTokenizer(WholeDocumentTokenizer):
    """A ``tokenizer.json`` with the token that separates documents.

    Args:
        model: JSON with the keys ``tokenizer`` (content of the ``tokenizer.json``), ``eos_token`` and
            ``special_tokens_in_text`` (whether special tokens in a text are taken for tokens).
    """

    def __init__(self, model: bytes) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(f"a tokenizer.json needs tokenizers ({error}); {install('hf')}") from None
        self._keep(model)
        content = json.loads(model)
        with _plain_errors():
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(json.dumps(content["tokenizer"]))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.special_tokens_in_text: bool = content["special_tokens_in_text"]
        self._tokenizer.encode_special_tokens = not self.special_tokens_in_text
        self._eos: str = content["eos_token"]
        eos_id = self._tokenizer.token_to_id(self._eos)
        if eos_id is None:
            raise UserError(
                f"the tokenizer has no token {self._eos!r} to separate documents; write tokenizer.eos_token"
            )
        self.eos_id = eos_id
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eos_piece(self) -> str:
        return self._eos

    @functools.cached_property
    def tokenizer_json(self) -> str:
        """Content of the ``tokenizer.json``."""
        return json.dumps(json.loads(self.model)["tokenizer"], ensure_ascii=False)

    def encode_whole(self, texts: list[str], threads: int) -> list[list[int]]:
        with _plain_errors():
            return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        with _plain_errors():
            text: str = self._tokenizer.decode([each for each in ids if each != self.eos_id], skip_special_tokens=False)
        return text


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn the errors of ``tokenizers``, among them panics of its Rust code, into ``ValueError``."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def read_hugging_face(
    path: Path, eos_token: str | None, special_tokens_in_text: bool, pattern: str | None = None
) -> HuggingFaceTokenizer:
    """Read a ``tokenizer.json``, the folder that holds one, or a file of ``tiktoken``.

    Args:
        eos_token: the token that separates documents. None: the one in ``tokenizer_config.json`` or
            ``special_tokens_map.json`` beside it, or else one with a well-known name.
        special_tokens_in_text: whether special tokens in a text are taken for tokens.
        pattern: for a file of ``tiktoken``, key of ``tiktoken_ranks.PATTERNS``.

    Raises:
        UserError: a file cannot be used, or no such token is found.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.suffix == ".tiktoken":
        eos_token = eos_token or tiktoken_ranks.EOS
        content = tiktoken_ranks.tokenizer_json(file, pattern, eos_token)
    else:
        content = _read_json(file)
    if not isinstance(content.get("model"), dict):
        raise UserError(f"tokenizer {file} is not a tokenizer of Hugging Face; write the path of one")
    if eos_token is None:
        eos_token = _eos_of_folder(file.parent) or _known_eos(file, content)
    for token in content.get("added_tokens") or []:
        if isinstance(token, dict) and token.get("content") == eos_token:
            token["special"] = True  # or text could contain it
    model = {"eos_token": eos_token, "special_tokens_in_text": special_tokens_in_text, "tokenizer": content}
    try:
        tokenizer = HuggingFaceTokenizer(json.dumps(model, sort_keys=True).encode())
        if not special_tokens_in_text and tokenizer.eos_id in tokenizer.encode(eos_token):
            raise UserError(f"the text {eos_token!r} would become the separator; write another tokenizer.eos_token")
        return tokenizer
    except UserError as error:
        raise UserError(f"tokenizer {file}: {error}") from None
    except ValueError as error:
        raise UserError(f"tokenizer {file} cannot be used ({error}); write the path of another") from None


def _eos_of_folder(folder: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            token = _read_json(folder / name).get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token:
                return token
    return None


def _known_eos(file: Path, content: dict[str, Any]) -> str:
    added = {str(token.get("content")) for token in content.get("added_tokens") or [] if isinstance(token, dict)}
    for token in KNOWN_EOS:
        if token in added:
            return token
    raise UserError(f"tokenizer {file} does not say which token ends a document; write tokenizer.eos_token")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        refuse_large(file)
        content = read_json(file, LARGEST)
    except OSError as error:
        raise UserError(f"tokenizer {file} cannot be read ({error.strerror}); write the path of a model file") from None
    except UserError:
        raise
    except ValueError:
        raise UserError(f"tokenizer {file} is not JSON; write the path of a tokenizer.json") from None
    if not isinstance(content, dict):
        raise UserError(f"tokenizer {file} is not a JSON object; write the path of a tokenizer.json")
    return content
