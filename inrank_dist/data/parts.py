"""Where text may be cut so that the tokens of the parts are the tokens of the whole.

SentencePiece puts pieces together from neighbouring characters, by score, until no two neighbours are a piece. Between
two characters that are neighbours in no piece of the vocabulary nothing is ever put together, and what happens on one
side does not depend on the other. So a cut there changes no token (of BPE; unigram adds up scores in 32 bits, whose
rounding depends on how long a text is, so there the cuts are part of the definition).
"""

from collections.abc import Iterable, Iterator, Set

#: SentencePiece writes a space as this character, so the character itself must go through byte pieces.
META_SPACE = "\u2581"

#: A part ends after the first line end behind so many characters. SentencePiece's BPE slows down with length.
PART_CHARACTERS = 1000

#: In a line longer than this a part ends between any two characters that no piece holds as neighbours.
LONG_LINE_CHARACTERS = 1 << 14

#: Where there is no such place for so many characters, a part ends there nevertheless. Here alone the tokens may be
#: others than those of the whole: no more than a few at the cut.
MOST_CHARACTERS = 1 << 17


def neighbours(pieces: Iterable[str]) -> frozenset[str]:
    """Pairs of characters that stand beside each other in a piece; ``pieces`` as SentencePiece writes them."""
    return frozenset(
        piece[index : index + 2].replace(META_SPACE, " ") for piece in pieces for index in range(len(piece) - 1)
    )


class Cutter:
    """Cuts texts into parts, at places that depend on the text alone and not on the pieces that it comes in.

    Attributes:
        irregular: whether a part has ended elsewhere than after the first line end behind ``PART_CHARACTERS``.
        forced: whether one had to end where a piece could have been.

    Args:
        neighbours: of the vocabulary, see ``neighbours``.
    """

    def __init__(self, neighbours: Set[str]) -> None:
        self.irregular = False
        self.forced = False
        self._neighbours = neighbours
        self._line_ends_are_safe = not any(pair[0] == "\n" for pair in neighbours)

    def parts(self, texts: Iterable[str]) -> Iterator[str]:
        """The parts of one text that comes in pieces. ``META_SPACE`` is a part of its own."""
        rest = ""
        for text in texts:
            start, rest = 0, rest + text
            while len(rest) - start > PART_CHARACTERS and (end := self._end(rest, start, final=False)) is not None:
                yield rest[start:end]
                start = end
            rest = rest[start:]
        start = 0
        if 0 < len(rest) <= PART_CHARACTERS and META_SPACE not in rest:
            yield rest  # most of the short documents
            return
        while start < len(rest):
            end = self._end(rest, start, final=True)
            assert end is not None
            yield rest[start:end]
            start = end

    def _end(self, text: str, start: int, *, final: bool) -> int | None:
        """Where the part that begins at ``start`` ends; None where the text so far does not tell."""
        if start == len(text):
            return None
        if text[start] == META_SPACE:
            return start + 1
        at = text.find("\n", start + PART_CHARACTERS, start + LONG_LINE_CHARACTERS)
        if 0 <= at < len(text) - 1 and self._line_ends_are_safe and text.find(META_SPACE, start, at) < 0:
            return at + 1  # nearly always
        # Of a huge piece only what a part can take is looked at.
        window = start + MOST_CHARACTERS + 1
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
        for end in range(start + LONG_LINE_CHARACTERS, min(limit, start + MOST_CHARACTERS)):
            if text[end - 1 : end + 1] not in self._neighbours:
                self.irregular = True
                return end
        if limit - start <= MOST_CHARACTERS:
            return limit if known else None
        self.irregular = True
        self.forced = True
        return start + MOST_CHARACTERS
