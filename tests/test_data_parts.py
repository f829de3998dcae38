"""Tokenising in parts: the tokens are those of the whole text, and the parts depend on the text alone."""

import io
import json
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from sharing import slow

from inrank_dist.data import parts
from inrank_dist.data.parts import META_SPACE, Cutter, neighbours
from inrank_dist.data.settings import TokenizerSettings
from inrank_dist.data.tokenizer import Tokenizer, train_tokenizer

SOURCE = Path(str(pickle.__file__)).read_text()


def train(**more: Any) -> Tokenizer:
    """A tokenizer as others train theirs: with pieces of our own choice."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCE.splitlines()),
        model_writer=model,
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=4,
        **{"model_type": "bpe", **more},
    )
    return Tokenizer(model.getvalue())


@pytest.fixture(scope="module", params=["ours", "symbols", "no-split"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Ours; one with symbols across line ends and words; one whose pieces hold spaces in the middle."""
    if request.param == "symbols":
        return train(user_defined_symbols=["\n\n", "\n    ", "e = s", "==", "self."])
    if request.param == "no-split":
        return train(split_by_whitespace=False)
    return train_tokenizer([SOURCE], TokenizerSettings(vocab_size=600))


def random_text(seed: int) -> str:
    """Long and short lines, runs of one character, and everything that SentencePiece treats by itself."""
    generator = random.Random(seed)
    stretches = []
    for _ in range(generator.randrange(1, 60)):
        start = generator.randrange(len(SOURCE) - 500)
        stretch = SOURCE[start : start + generator.randrange(500)]
        kind = generator.randrange(8)
        if kind < 3:
            stretch = stretch.replace("\n", " " if kind else "")
        elif kind == 3:
            stretch = generator.choice(["x", "=", " ", "\n", "\u00e9", "self."]) * generator.randrange(300)
        elif kind == 4:
            stretch = generator.choice([META_SPACE, "\u2585", "\x00", "\U0001f600", "\r\n", "\t", "<s>"])
        stretches.append(stretch)
    return "".join(stretches)


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    """As SentencePiece encodes a text at once; it has no way to write its own mark for a space."""
    ids: list[int] = []
    for index, stretch in enumerate(text.split(META_SPACE)):
        ids += (tokenizer.meta_space if index else []) + tokenizer.encode_parts([stretch], 1)[0]
    return ids


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every kind of cut comes often in short texts."""
    monkeypatch.setattr(parts, "PART_CHARACTERS", 20)
    monkeypatch.setattr(parts, "LONG_LINE_CHARACTERS", 40)


@pytest.mark.usefixtures("small_parts")
def test_the_tokens_of_the_parts_are_those_of_the_whole(tokenizer: Tokenizer) -> None:
    """Exactly, with any vocabulary: no cut lies where a piece could have been."""
    cut_within_a_line = False
    for seed in range(200):
        text = random_text(seed)
        encoding = tokenizer.encode_documents([[text]])
        assert [token for ids in encoding for token in ids.tolist()] == whole(tokenizer, text), seed
        assert not encoding.cutter.forced
        cut_within_a_line = cut_within_a_line or encoding.cutter.irregular
    assert cut_within_a_line


@pytest.mark.usefixtures("small_parts")
def test_a_cut_where_a_piece_could_be_is_noticed(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the test above can fail: cutting anywhere changes tokens."""
    monkeypatch.setattr(Cutter, "__init__", cut_anywhere)
    changed = 0
    for seed in range(50):
        text = random_text(seed)
        encoding = tokenizer.encode_documents([[text]])
        changed += [token for ids in encoding for token in ids.tolist()] != whole(tokenizer, text)
    assert changed > 10


def cut_anywhere(self: Cutter, neighbours: Any) -> None:
    self.irregular = self.forced = False
    self._neighbours, self._line_ends_are_safe = frozenset(), True


@pytest.mark.parametrize("limits", [(20, 40, 60), (5, 8, 8), slow((1000, 1 << 14, 1 << 17))])
def test_parts_depend_on_the_text_alone(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int, int]
) -> None:
    """Not on the blocks that it is read in: these may end anywhere."""
    for name, limit in zip(("PART_CHARACTERS", "LONG_LINE_CHARACTERS", "MAX_CHARACTERS"), limits, strict=True):
        monkeypatch.setattr(parts, name, limit)
    for seed in range(40):
        text = random_text(seed)
        first = Cutter(tokenizer.neighbours)
        found = [*first.parts([text])]
        assert "".join(found) == text and max(map(len, found)) <= limits[2]
        for size in (1, 3, 17, 4000):
            cutter = Cutter(tokenizer.neighbours)
            assert [*cutter.parts(text[at : at + size] for at in range(0, len(text), size))] == found
            assert (cutter.irregular, cutter.forced) == (first.irregular, first.forced)


def test_where_a_part_must_end() -> None:
    """The rule for text in which a piece could be anywhere: after ``MAX_CHARACTERS``, whatever comes."""
    cutter = Cutter(neighbours(["xx", f"{META_SPACE}x"]))
    text = "x" * (2 * parts.MAX_CHARACTERS + 5)
    assert [len(part) for part in cutter.parts([text])] == [parts.MAX_CHARACTERS, parts.MAX_CHARACTERS, 5]
    assert cutter.forced
    cutter = Cutter(neighbours(["xx", f"{META_SPACE}x"]))
    text = "x" * parts.LONG_LINE_CHARACTERS + "xxx y\n" + "x"
    assert [*cutter.parts([text])] == ["x" * parts.LONG_LINE_CHARACTERS + "xxx", " y\nx"]
    assert cutter.irregular and not cutter.forced


MEMORY = """
import json, sys
from inrank_dist.data.tokenizer import Tokenizer
from inrank_dist.train.memory import peak_resident_bytes

tokenizer = Tokenizer.load(sys.argv[1])
line, size = sys.argv[2], int(sys.argv[3])
piece = (line * (1 << 20))[: 1 << 20]
tokenizer.encode(piece)
before = peak_resident_bytes()
tokens = sum(len(ids) for ids in tokenizer.encode_documents([(piece for _ in range(size))]))
print(json.dumps([peak_resident_bytes() - before, tokens]))
"""


@pytest.mark.parametrize("line", [slow("some words of a line\n"), slow("some words without an end "), slow("noends")])
def test_memory_does_not_depend_on_the_document(tmp_path: Path, line: str) -> None:
    """One document of 16 MB, from a source that never holds it: a few MB above one of 1 MB, whatever its lines."""
    train_tokenizer([SOURCE], TokenizerSettings(vocab_size=600)).save(tmp_path / "m.model")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "m.model"), line, "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    more, tokens = json.loads(done.stdout)
    assert tokens > 3e6
    assert more < 32 << 20


def test_arrays_are_bounded() -> None:
    """A document comes in arrays of about ``BATCH_CHARACTERS``, and many short ones share an array."""
    tokenizer = train_tokenizer([SOURCE], TokenizerSettings(vocab_size=600))

    def documents() -> Iterator[list[str]]:
        for index in range(3000):
            yield [f"document {index}\n"]
        yield ["a long one "] * 100_000

    arrays = [*tokenizer.encode_documents(documents(), separate=True)]
    assert max(map(len, arrays)) <= (1 << 18) + parts.MAX_CHARACTERS and len(arrays) < 10
    ids = np.concatenate(arrays)
    assert ids.dtype == np.uint16 and (ids == tokenizer.eos_id).sum() == 3001
