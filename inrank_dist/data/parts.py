"""Splits text so that the tokens of the parts are the tokens of the whole.

SentencePiece merges neighbouring characters and pieces, by score, until no two neighbours form a piece. Two characters
that are neighbours in no piece of the vocabulary are never merged, and the merges on one side do not depend on the
other side. So splitting between them changes no token of BPE. (Unigram sums scores in float32, with rounding that
depends on the length of the text, so there the split is part of the definition of the tokens.)
"""

from collections.abc import Iterable, Iterator, Set

#: SentencePiece represents a space by this character, so the character itself must be encoded in byte pieces.
META_SPACE = "\u2581"

#: A part ends at the first line end after this many characters. SentencePiece's BPE slows down with length.
PART_CHARACTERS = 1000

#: In a longer line, a part ends between any two characters that are neighbours in no piece.
LONG_LINE_CHARACTERS = 1 << 14

#: If there is no such place within this many characters, a part is cut here anyway. Only then may the tokens differ
#: from those of the whole text, by a few tokens at the cut.
MAX_CHARACTERS = 1 << 17


def neighbours(pieces: Iterable[str]) -> frozenset[str]:
    """Pairs of adjacent characters within ``pieces``, which are as SentencePiece writes them."""
    return frozenset(
        piece[index : index + 2].replace(META_SPACE, " ") for piece in pieces for index in range(len(piece) - 1)
    )


class Cutter:
    """Splits texts into parts. The cuts depend only on the text, not on the chunks in which it arrives.

    Attributes:
        irregular: whether any part ended elsewhere than at the first line end after ``PART_CHARACTERS``.
        forced: whether any part had to end where a piece could have crossed the cut.

    Args:
        neighbours: of the vocabulary, see the function ``neighbours``.
    """

    def __init__(self, neighbours: Set[str]) -> None:
        self.irregular = False
        self.forced = False
        self._neighbours = neighbours
        self._line_ends_are_safe = not any(pair[0] == "\n" for pair in neighbours)

    def parts(self, texts: Iterable[str]) -> Iterator[str]:
        """Parts of one text, which arrives in chunks. ``META_SPACE`` is a part by itself."""
        rest = ""
        for text in texts:
            start, rest = 0, rest + text
            while len(rest) - start > PART_CHARACTERS and (end := self._end(rest, start, final=False)) is not None:
                yield rest[start:end]
                start = end
            rest = rest[start:]
        start = 0
        if 0 < len(rest) <= PART_CHARACTERS and META_SPACE not in rest:
            yield rest  # fast path for short documents
            return
        while start < len(rest):
            end = self._end(rest, start, final=True)
            assert end is not None
            yield rest[start:end]
            start = end

    def _end(self, text: str, start: int, *, final: bool) -> int | None:
        """End of the part that begins at ``start``; None if more text is needed to decide."""
        if start == len(text):
            return None
        if text[start] == META_SPACE:
            return start + 1
        at = text.find("\n", start + PART_CHARACTERS, start + LONG_LINE_CHARACTERS)
        if 0 <= at < len(text) - 1 and self._line_ends_are_safe and text.find(META_SPACE, start, at) < 0:
            return at + 1  # the common case
        # Scan at most what fits into one part.
        window = start + MAX_CHARACTERS + 1
        limit = text.find(META_SPACE, start, window)
        known = limit >= 0 or (final and len(text) <= window)
        limit = limit if limit >= 0 else min(len(text), window)
        at = start + PART_CHARACTERS - 1
        while (at := text.find("\n", at + 1, min(limit, start + LONG_LINE_CHARACTERS))) >= 0:
            if at + 1 == limit:
                return limit if known else None
            if self._line_ends_are_safe or text[at : at + 2] not in self._neighbours:
                return at + 1
            self.irregular = True
        for end in range(start + LONG_LINE_CHARACTERS, min(limit, start + MAX_CHARACTERS)):
            if text[end - 1 : end + 1] not in self._neighbours:
                self.irregular = True
                return end
        if limit - start <= MAX_CHARACTERS:
            return limit if known else None
        self.irregular = True
        self.forced = True
        return start + MAX_CHARACTERS
