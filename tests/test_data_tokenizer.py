"""The tokenizer gives back every text exactly, trains reproducibly, and explains what it cannot do."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from inrank_dist.data.settings import TokenizerSettings
from inrank_dist.data.tokenizer import SEPARATOR, Tokenizer, load_tokenizer, train_tokenizer
from inrank_dist.runtime.errors import UserError

TEXTS = [Path(str(source.__file__)).read_text() for source in (pickle, pytest, sentencepiece)]


def train(**settings: Any) -> Tokenizer:
    return train_tokenizer(TEXTS, TokenizerSettings(**{"vocab_size": 400, **settings}))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train(kind=request.param)


#: Characters that SentencePiece uses as marks, that line readers drop, or that normalization would change.
DIFFICULT = st.text("\u2581\u2585 \t\n\r\x00\x0b\x1f\x7f\x85\u2028\ufeff\ufffd\u00e9e\u0301\U0001f600ab", max_size=30)


@example("")
@example("\u2581")
@example(" \u2581 a\u2581\u2581b")
@example("\x00")
@example("  leading, trailing  ")
@example(SEPARATOR + "<unk><0x41><s></s>")
@example("line\r\nline\n\n\n    indented\n" * 100)
@example("x" * 5000)
@given(st.text() | DIFFICULT)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    """Generated text and perplexity per byte are wrong wherever this fails."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids, "a document must not be able to end itself"
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_encoding_in_parts_changes_nothing() -> None:
    """Long text is encoded in parts for speed; the tokens must be those of the whole.

    Of bpe exactly; unigram compares sums over the whole text in 32 bits, whose rounding depends on its length.
    """
    tokenizer = train(kind="bpe")
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    for text in TEXTS:
        assert "\u2581" not in text and tokenizer.encode(text) == processor.encode(text)


def test_vocabulary(tokenizer: Tokenizer) -> None:
    """The size is exactly the one asked for, and the separator is a token of its own that prints as nothing."""
    assert tokenizer.vocab_size == 400
    assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_text_is_compressed(tokenizer: Tokenizer) -> None:
    """Guards against a silent fall to bytes, which would still pass every round trip."""
    text = TEXTS[0]
    assert len(tokenizer.encode(text)) < 0.75 * len(text.encode())


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_reproducible(kind: str) -> None:
    """Two machines that prepare the same text must agree on the fingerprint."""
    first, second = train(kind=kind), train(kind=kind)
    assert first.fingerprint == second.fingerprint
    assert train(kind=kind, vocab_size=401).fingerprint != first.fingerprint


def test_max_training_bytes_limits_the_text() -> None:
    """Text behind the limit has no influence, also when the limit falls inside a document."""
    settings = TokenizerSettings(vocab_size=400, max_training_bytes=5000)
    head = TEXTS[0].encode()[:5000].decode()
    assert train_tokenizer(TEXTS, settings).model == train_tokenizer([head, "never seen"], settings).model


def test_training_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """SentencePiece's own log would bury a terminal."""
    train()
    assert capfd.readouterr() == ("", "")


def test_save_load_and_pickle(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A run folder keeps the model; worker processes receive it pickled."""
    tokenizer.save(tmp_path / "m.model")
    assert [path.name for path in tmp_path.iterdir()] == ["m.model"]
    for other in (Tokenizer.load(tmp_path / "m.model"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.fingerprint == tokenizer.fingerprint
        assert other.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_too_large_a_vocabulary_names_one_that_works(kind: str) -> None:
    """The message's number is tried, because a hint that fails again is worse than none."""
    with pytest.raises(UserError, match=r"tokenizer.vocab_size is 500000.*write at most (\d+)") as caught:
        train(kind=kind, vocab_size=500_000)
    most = int(str(caught.value).split("at most ")[1].split(",")[0])
    assert train(kind=kind, vocab_size=most).vocab_size == most


def test_too_small_a_vocabulary_names_one_that_works() -> None:
    """Text of many different characters needs more than the usual minimum."""
    text = " ".join(chr(0x4E00 + index) for index in range(200))
    with pytest.raises(UserError, match="write at least") as caught:
        train_tokenizer([text], TokenizerSettings(vocab_size=300))
    least = int(str(caught.value).split("at least ")[1])
    assert train_tokenizer([text], TokenizerSettings(vocab_size=least)).vocab_size == least


@pytest.mark.parametrize("texts", [[], [""], ["\n\n"]])
def test_nothing_to_train_on(texts: list[str]) -> None:
    """Blank text reaches the trainer when every document is white space."""
    with pytest.raises(UserError, match="nothing but white space"):
        train_tokenizer(texts, TokenizerSettings())


def test_too_little_text_for_any_vocabulary() -> None:
    """The largest vocabulary of a few characters is below the smallest accepted one, so it is no advice."""
    with pytest.raises(UserError, match=r"can fill; give more text$"):
        train_tokenizer(["  "], TokenizerSettings())


def test_a_lone_surrogate_is_the_users_error(tokenizer: Tokenizer) -> None:
    """A prompt typed in a terminal of another encoding arrives with surrogates in it."""
    with pytest.raises(UserError, match="not Unicode at character 1"):
        tokenizer.encode("a\ud800")


def test_path_must_agree_with_vocab_size(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The model is built from vocab_size; a silent disagreement would index past the embedding."""
    tokenizer.save(tmp_path / "m.model")
    path = str(tmp_path / "m.model")
    assert load_tokenizer(TokenizerSettings(path=path, vocab_size=400)).fingerprint == tokenizer.fingerprint
    with pytest.raises(UserError, match=r"vocab_size is 2048.*has 400 tokens; write tokenizer.vocab_size: 400$"):
        load_tokenizer(TokenizerSettings(path=path))


def test_models_that_cannot_be_used(tmp_path: Path) -> None:
    """A missing file, a file of something else, a damaged one, and a model without a separator."""
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.load(tmp_path / "absent.model")
    (tmp_path / "noise.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path / "noise.model")
    (tmp_path / "cut.model").write_bytes(b'{"tokenizer": {}')
    with pytest.raises(UserError, match="is damaged"):
        Tokenizer.load(tmp_path / "cut.model")
    common: dict[str, Any] = {"sentence_iterator": iter(TEXTS[0].splitlines()), "vocab_size": 400, "minloglevel": 4}
    sentencepiece.SentencePieceTrainer.train(model_prefix=str(tmp_path / "usual"), eos_id=-1, **common)
    with pytest.raises(UserError, match="has no end-of-sentence piece to separate documents"):
        Tokenizer.load(tmp_path / "usual.model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 100}, "tokenizer.vocab_size is 100; .* at least 300"),
        ({"max_training_bytes": 0}, "tokenizer.max_training_bytes is 0; write 1 or more"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    """Impossible values are refused before any work."""
    with pytest.raises(UserError, match=message):
        TokenizerSettings(**settings)
