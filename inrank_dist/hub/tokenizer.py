"""SentencePiece models as fast tokenizers of ``transformers``."""

from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from .writer import edit_json

SPACE = "\u2581"
"""What SentencePiece writes for a space in a piece."""

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Types of pieces (sentencepiece_model.proto)."""

UNIGRAM = 1
"""Type of model (sentencepiece_model.proto)."""

NEVER = -1e6
"""Score of unigram pieces that text never matches. It is far below that of any segmentation into characters."""


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, eos_token: str, max_seq_len: int, *, special_tokens_in_text: bool = False
) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    The saved tokenizer encodes as in training: it adds no tokens and does not truncate.

    Args:
        folder: an existing folder.
        tokenizer: from ``fast_tokenizer``, or read from a ``tokenizer.json``.
        eos_token: the token that separates documents.
        max_seq_len: longest sequence of the model in tokens.
        special_tokens_in_text: whether special tokens in a text are taken for tokens.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if type(tokenizer.post_processor).__name__ != "ByteLevel":  # others add tokens
        tokenizer.post_processor = None
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=eos_token,
        eos_token=eos_token,
        pad_token=eos_token,
        model_max_length=max_seq_len,
        split_special_tokens=not special_tokens_in_text,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})  # as before version 5


def fast_tokenizer(model: bytes) -> Tokenizer:
    """Convert a SentencePiece model with byte fallback and without normalization.

    A space in a piece is a space here, so that the character U+2581 in a text is an unknown character, which is encoded
    as bytes. A BPE model gives the same ids as SentencePiece for every text. A unigram model may choose another
    one of several segmentations with equal scores, because SentencePiece adds scores in float32.
    """
    proto = _parse(model)
    pieces = [(piece.piece.replace(SPACE, " "), piece.score, piece.type) for piece in proto.pieces]
    unknown = proto.trainer_spec.unk_id
    if proto.trainer_spec.model_type == UNIGRAM:
        scores = [(text, score if kind == NORMAL else NEVER) for text, score, kind in pieces]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=unknown, byte_fallback=True))
    else:
        vocabulary = {text: index for index, (text, _, _) in enumerate(pieces)}
        merges = _merges({text: (-score, index) for index, (text, score, kind) in enumerate(pieces) if kind == NORMAL})
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=pieces[unknown][0], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    for special, wanted in ((True, CONTROL), (False, USER_DEFINED)):
        added = [AddedToken(text, special=special, normalized=False) for text, _, kind in pieces if kind == wanted]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _merges(vocabulary: dict[str, tuple[float, int]]) -> list[tuple[str, str]]:
    """Return the merges of a BPE model, best first.

    Args:
        vocabulary: normal piece -> its position in the order of the merges.
    """
    merges = []
    for text in sorted(vocabulary, key=vocabulary.__getitem__):
        splits = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        found = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
        merges += sorted(found, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def _parse(model: bytes) -> Any:
    """Return the ``ModelProto`` of a SentencePiece model."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    return proto
