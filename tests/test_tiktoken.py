"""Ranks in the format of tiktoken, compared with tiktoken itself."""

import base64
import os
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from runs import small_config, train
from sharing import slow
from test_export import export, library_texts, loaded, strings
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from inrank_dist.data import Tokenizer
from inrank_dist.data.settings import TokenizerSettings
from inrank_dist.data.tiktoken_ranks import PATTERNS, _byte_characters
from inrank_dist.data.tokenizer import load_tokenizer
from inrank_dist.runtime.errors import UserError

AS_PUBLISHED = {
    "gpt2": PATTERNS["gpt2"],
    "cl100k": (  # of tiktoken 0.14: the same splits with possessive quantifiers
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
        r"|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "o200k": PATTERNS["o200k"],
}


def trained(pattern: str, folder: Path) -> tuple[Path, dict[bytes, int]]:
    """A file of 600 ranks, and the ranks."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(library_texts(), trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    ranks = {bytes(byte_of[each] for each in token): rank for token, rank in tokenizer.get_vocab().items()}
    file = folder / "ranks.tiktoken"
    lines = [
        f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in sorted(ranks.items(), key=lambda i: i[1])
    ]
    file.write_text("".join(lines))
    return file, ranks


def read(file: Path, pattern: str | None = "cl100k", **settings: Any) -> Tokenizer:
    return load_tokenizer(TokenizerSettings(path=str(file), pattern=pattern, vocab_size=601, **settings))


@pytest.mark.parametrize("pattern", [slow("gpt2"), "cl100k", slow("o200k")])
def test_ids_are_those_of_tiktoken(tmp_path: Path, pattern: str) -> None:
    file, ranks = trained(pattern, tmp_path)
    theirs = tiktoken.Encoding("x", pat_str=AS_PUBLISHED[pattern], mergeable_ranks=ranks, special_tokens={})
    ours = read(file, pattern)
    for text in [*strings(2000), "it'S aren't I\u212a'\u017f", "1234567 \u0661\u0662", "a\u3000\u0085\n\n  b\r\n "]:
        ids = ours.encode(text)
        assert ids == theirs.encode_ordinary(text) and ours.decode(ids) == text
    assert (ours.eos_id, ours.eos_piece) == (600, "<|endoftext|>")
    assert ours.eos_id not in ours.encode("a<|endoftext|>")


def test_a_run_and_its_export(corpus: Path, tmp_path: Path) -> None:
    file, ranks = trained("cl100k", tmp_path)
    settings = {"tokenizer__path": file, "tokenizer__pattern": "cl100k", "tokenizer__vocab_size": 601}
    train(small_config(corpus, run__dir=tmp_path / "run", checkpoint__interval=30, **settings))
    theirs = AutoTokenizer.from_pretrained(export(tmp_path / "run", tmp_path / "out"))
    encoding = tiktoken.Encoding("x", pat_str=AS_PUBLISHED["cl100k"], mergeable_ranks=ranks, special_tokens={})
    ours = loaded(tmp_path / "run").tokenizer
    for text in strings(100):
        assert theirs(text).input_ids == ours.encode(text) == encoding.encode_ordinary(text)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.unlink(), "cannot be read"),
        (lambda file: os.truncate(file, 1 << 40), "is larger than 256 MiB"),
        (lambda file: file.write_bytes(b"\x80\x02cos\nsystem\n"), "line 1, is not a token and its rank"),
        (lambda file: file.write_text("QQ== 0\nnot base64 1\n"), "line 2, is not a token and its rank"),
        (lambda file: file.write_text("QQ== 0\nQg== 5\n"), "does not number its tokens from 0 on"),
        (lambda file: file.write_text("QQ== 0\nQg== 1\n"), "has no token for byte 0, so it cannot encode all text"),
    ],
)
def test_a_file_that_is_refused(tmp_path: Path, damage: Any, said: str) -> None:
    file = tmp_path / "ranks.tiktoken"
    file.touch()
    damage(file)
    with pytest.raises(UserError) as raised:
        read(file)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_the_pattern_must_be_named(tmp_path: Path) -> None:
    (tmp_path / "ranks.tiktoken").touch()
    with pytest.raises(
        UserError, match=r"does not say how text is split; write tokenizer.pattern: gpt2, cl100k \(also"
    ):
        read(tmp_path / "ranks.tiktoken", None)
    with pytest.raises(
        UserError, match=r"tokenizer.pattern is cl100k but .*a.json is not a .tiktoken file; leave patt"
    ):
        read(tmp_path / "a.json")
