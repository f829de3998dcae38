"""BPE ranks in the format of ``tiktoken`` as a tokenizer of Hugging Face."""

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError, install
from .tokenizer import refuse_large

PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""Patterns that split a text before pairs are merged, by the names of ``tiktoken``. Llama 3 has that of cl100k."""

EOS = "<|endoftext|>"


def tokenizer_json(file: Path, pattern: str | None, eos_token: str) -> dict[str, Any]:
    """Return the content of the ``tokenizer.json`` that gives the ids of ``tiktoken``.

    Args:
        file: lines of a token in base64 and its rank.
        pattern: key of ``PATTERNS``.
        eos_token: token that separates documents. Its id is the number of ranks.

    Raises:
        UserError: the file cannot be used, or there is no pattern.
    """
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise UserError(f"a .tiktoken file needs tokenizers ({error}); {install('hf')}") from None
    if pattern is None:
        raise UserError(
            f"tokenizer {file} does not say how text is split; write tokenizer.pattern: gpt2, cl100k (also for Llama "
            "3) or o200k, or convert it to a tokenizer.json with TikTokenConverter of transformers"
        )
    ranks = _read(file)
    shown = _byte_characters()
    names = {token: "".join(shown[byte] for byte in token) for token in ranks}
    merges = []
    for token in ranks:  # in the order of the ranks
        cuts = [(token[:end], token[end:]) for end in range(1, len(token))]
        known = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        merges += sorted(known, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    if eos_token in vocabulary:
        raise UserError(f"tokenizer {file} has {eos_token!r} as text; write another tokenizer.eos_token")
    pairs = [(names[left], names[right]) for left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([eos_token])
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def _read(file: Path) -> dict[bytes, int]:
    """Return token -> rank, in the order of the ranks."""
    advice = "write the path of a file whose lines are a token in base64 and its rank"
    try:
        refuse_large(file)
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"tokenizer {file} cannot be read ({error.strerror}); {advice}") from None
    ranks = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"tokenizer {file}, line {number}, is not a token and its rank; {advice}") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or b"" in ranks:
        raise UserError(f"tokenizer {file} does not number its tokens from 0 on; {advice}")
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise UserError(f"tokenizer {file} has no token for byte {missing}, so it cannot encode all text; {advice}")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _byte_characters() -> dict[int, str]:
    """Return the character that stands for each byte in byte-level BPE (Radford et al., 2019).

    Printable bytes stand for themselves, and the others are numbered from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
