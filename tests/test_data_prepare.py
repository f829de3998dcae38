"""Preparation packs the exact token stream, is repeated only when something changed, and leaves no wreck."""

import json
import logging
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, are_progress_bars_disabled

from inrank_dist.data import DataSettings, Prepared, Tokenizer, TokenizerSettings, prepare
from inrank_dist.data.packing import pack, unigram_entropy
from inrank_dist.runtime.errors import UserError

BLOCK = 16


class Corpus:
    """A small corpus of files in ``folder``, and its preparation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        (folder / "text").mkdir()
        words = "the quick brown fox jumps over a lazy dog while seven wizards judge my vow of quartz"
        generator = np.random.default_rng(0)
        for name in range(30):
            lines = [" ".join(generator.choice(words.split(" "), 8)) for _ in range(20)]
            (folder / "text" / f"{name:02}.txt").write_text("\n".join(lines))

    def prepare(
        self, *, block: int = BLOCK, tokenizer: dict | None = None, progress: bool = False, **data: Any
    ) -> Prepared:
        settings: dict[str, Any] = {
            "source": "files",
            "paths": [str(self.folder / "text" / "*.txt")],
            "validation_fraction": 0.1,
        }
        return prepare(
            DataSettings(**{**settings, "cache_dir": str(self.cache), **data}),
            TokenizerSettings(**{"vocab_size": 310, **(tokenizer or {})}),
            block,
            progress=progress,
        )

    def left_over(self) -> list[str]:
        """What is in the cache but locks, reasons of failures, and whole folders."""
        if not self.cache.is_dir():
            return []
        whole = {path.name for path in self.cache.iterdir() if (path / "prepared.json").is_file()}
        plain = {path.name for path in self.cache.iterdir() if ".lock." in path.name or path.suffix == ".failed"}
        return sorted({path.name for path in self.cache.iterdir()} - whole - plain)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


def rows_of(dataset: Dataset) -> np.ndarray:
    return dataset.with_format("numpy")[:]["input_ids"]


def stream_of(rows: np.ndarray) -> list[int]:
    """The stream that overlapping rows were cut from."""
    return [*rows[:, :-1].ravel().tolist(), int(rows[-1, -1])]


# Packing


@pytest.mark.parametrize("block", [1, 2, 5, 16, 100])
def test_rows_are_the_token_stream(corpus: Corpus, block: int) -> None:
    """No token between documents or rows is lost or predicted twice; only the end is cut, by less than a row."""
    prepared = corpus.prepare(block=block)
    texts = [path.read_text() for path in sorted((corpus.folder / "text").glob("*.txt"))]
    total = 0
    for dataset, tokens in ((prepared.train, prepared.train_tokens), (prepared.validation, prepared.validation_tokens)):
        rows = rows_of(dataset)
        assert rows.shape[1] == block + 1 and tokens == rows.shape[0] * block
        assert (rows[:-1, -1] == rows[1:, 0]).all()
        stream = stream_of(rows)
        end = [prepared.tokenizer.eos_id]
        documents = [prepared.tokenizer.encode(text) + end for text in texts]
        rest = stream
        while rest:
            match = next(
                document for document in documents if rest == document[: len(rest)] or rest[: len(document)] == document
            )
            documents.remove(match)
            total += len(match)
            rest = rest[len(match) :]
    assert total >= sum(len(prepared.tokenizer.encode(text)) + 1 for text in texts) - 2 * block
    assert prepared.block_length == block


@pytest.mark.parametrize("lengths", [[5], [1] * 9, [3, 0, 7, 2], [2500], [999, 1, 1001], [40, 3] * 150])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_packing_of_any_lengths(tmp_path: Path, lengths: list[int], block: int) -> None:
    """Record batches and document batches end at other places than rows do; none may show."""
    stream = np.random.default_rng(1).integers(0, 50, sum(lengths))
    documents = np.split(stream, np.cumsum(lengths)[:-1])
    documents = [document.astype(np.uint16) for document in documents]
    count, counts = pack(documents, np.dtype(np.uint16), block, tmp_path / "rows.arrow")
    rows = Dataset.from_file(str(tmp_path / "rows.arrow"))
    assert count == (len(stream) - 1) // block
    assert len(rows) == count
    assert stream_of(rows_of(rows)) == stream[: count * block + 1].tolist()
    assert counts.tolist() == np.bincount(stream).tolist()


def test_join_rows_puts_nothing_between(corpus: Corpus, tmp_path: Path) -> None:
    """WikiText's rows are lines: a separator after each would be a token that is far too easy to predict."""
    rows = [{"text": f"the quick brown fox {n}\n"} for n in range(200)]
    for name in ("t.jsonl", "v.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths: dict[str, Any] = {"paths": [str(tmp_path / "t.jsonl")], "validation_paths": [str(tmp_path / "v.jsonl")]}
    tokenizer = {"vocab_size": 300}
    joined = corpus.prepare(join_rows=True, tokenizer=tokenizer, **paths)
    text = "".join(row["text"] for row in rows)
    packed = rows_of(joined.train)
    assert text.startswith(joined.tokenizer.decode(packed[:, 1:].ravel().tolist()))
    assert (packed[:, 0] == joined.tokenizer.eos_id).all(), "what generate begins with is trained"
    assert joined.tokenizer.eos_id not in packed[:, 1:]
    separate = corpus.prepare(tokenizer=tokenizer, **paths)
    assert separate.tokenizer.eos_id in rows_of(separate.train)
    assert separate.fingerprint != joined.fingerprint


def test_several_workers_give_the_same(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of threads is no part of the result, nor is how much text is encoded at a time."""
    tokenizer = corpus.prepare().tokenizer
    texts = [path.read_text() for path in sorted((corpus.folder / "text").iterdir())]
    end = [tokenizer.eos_id]
    whole = [token for text in texts for token in tokenizer.encode(text) + end]
    for threads, characters in ((1, 1 << 18), (2, 1 << 18), (3, 500)):
        monkeypatch.setattr("inrank_dist.data.tokenizer.BATCH_CHARACTERS", characters)
        ids = tokenizer.encode_documents(([text] for text in texts), separate=True, threads=threads)
        assert np.concatenate([*ids]).tolist() == whole


def test_unigram_entropy_by_hand(corpus: Corpus) -> None:
    """The number that a validation loss is judged by: once by its definition, token by token."""
    prepared = corpus.prepare(block=1)  # nothing is cut off at this length
    train, validation = (np.array(stream_of(rows_of(part))) for part in (prepared.train, prepared.validation))
    total = 0.0
    for token in validation:
        total -= np.log(((train == token).sum() + 1) / (len(train) + 310))
    assert prepared.unigram_entropy == pytest.approx(total / len(validation), rel=1e-12)
    assert 0 < prepared.unigram_entropy < np.log(310)


def test_unigram_entropy_of_an_unseen_token() -> None:
    """Counts may be shorter than the vocabulary; a token that training lacks costs log(N + V), not infinity."""
    assert unigram_entropy(np.array([3]), np.array([0, 2]), 5) == pytest.approx(np.log(8))


# Once, and again when something changed


def test_second_start_reads_only(corpus: Corpus, caplog: pytest.LogCaptureFixture) -> None:
    """Every restart of a run passes here."""
    first = corpus.prepare()
    stamp = (first.folder / "prepared.json").stat().st_mtime_ns
    caplog.set_level(logging.INFO, "inrank_dist")
    second = corpus.prepare(progress=True)
    assert caplog.messages == []
    assert (second.folder / "prepared.json").stat().st_mtime_ns == stamp
    assert {**vars(first), "train": 0, "validation": 0, "tokenizer": 0} == {
        **vars(second),
        "train": 0,
        "validation": 0,
        "tokenizer": 0,
    }
    assert (rows_of(first.train) == rows_of(second.train)).all()


@pytest.mark.parametrize(
    "change",
    [
        {"block": 17},
        {"max_bytes": 9000},
        {"validation_fraction": 0.2},
        {"tokenizer": {"vocab_size": 311}},
        {"tokenizer": {"kind": "unigram", "vocab_size": 300}},
        {"tokenizer": {"max_training_bytes": 3000}},
    ],
)
def test_what_changes_the_result_prepares_anew(corpus: Corpus, change: dict) -> None:
    """And gives another fingerprint, so that a checkpoint refuses it; the old folder stays for its own runs."""
    first = corpus.prepare()
    second = corpus.prepare(**change)
    assert second.fingerprint != first.fingerprint and second.folder != first.folder
    assert corpus.prepare().folder == first.folder and first.folder.is_dir()


def test_an_edited_file_prepares_anew(corpus: Corpus) -> None:
    """Even where its size and modification time are as before."""
    first = corpus.prepare()
    path = corpus.folder / "text" / "07.txt"
    status = path.stat()
    path.write_text(path.read_text().swapcase())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert corpus.prepare().fingerprint != first.fingerprint


def test_what_does_not_change_the_result_does_not(corpus: Corpus) -> None:
    """The place of the files, and settings of other sources or of speed."""
    first = corpus.prepare()
    (corpus.folder / "text").rename(corpus.folder / "moved")
    moved = [str(corpus.folder / "moved" / "*.txt")]
    assert corpus.prepare(paths=moved, num_workers=2, train_split="unused").folder == first.folder


def test_a_given_tokenizer_is_used(corpus: Corpus) -> None:
    """And gives the same fingerprint as training it did: what counts is the model, not how it came."""
    first = corpus.prepare()
    path = corpus.folder / "kept.model"
    first.tokenizer.save(path)
    second = corpus.prepare(tokenizer={"path": str(path)})
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert second.fingerprint == first.fingerprint and second.folder != first.folder


def test_stdlib_prepares_with_the_defaults(corpus: Corpus) -> None:
    """The first run's data, at a size for a test; a model that learned nothing of context would reach the entropy."""
    prepared = corpus.prepare(source="stdlib", paths=[], max_bytes=300_000, tokenizer={"vocab_size": 1000})
    assert 60_000 < prepared.train_tokens < 300_000
    assert 4 < prepared.unigram_entropy < np.log(1000)
    text = prepared.tokenizer.decode(stream_of(rows_of(prepared.train)))
    assert "import " in text


# What the user sees


@pytest.mark.usefixtures("progress_is_on")
def test_lines_where_there_is_no_terminal(
    corpus: Corpus, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A batch job's log gets one line at the start and end of each phase, and no bars of any library."""
    caplog.set_level(logging.INFO, "inrank_dist")
    bars = are_progress_bars_disabled()
    corpus.prepare(progress=True)
    assert are_progress_bars_disabled() == bars, "another part of the program may want them"
    phases = caplog.messages
    assert any("training a bpe tokenizer" in line for line in phases)
    assert all(line.endswith(" ...") for line in phases[::2])
    assert all(": done in " in line for line in phases[1::2])
    assert capfd.readouterr().err.count("\r") == 0


@pytest.mark.usefixtures("progress_is_on")
def test_quiet_when_asked(corpus: Corpus, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """One process of a job reports; the others must not repeat it."""
    caplog.set_level(logging.INFO, "inrank_dist")
    corpus.prepare()
    assert caplog.messages == [] and capfd.readouterr() == ("", "")


# Failures


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 100_000}, r"the train text has \d+ tokens and a row takes 100001 "),
        ({"block": 2000}, r"the validation text has \d+ tokens and a row takes 2001 "),
        ({"tokenizer": {"vocab_size": 90_000}}, r"tokenizer.vocab_size is 90000, more .* at most \d+"),
        ({"tokenizer": {"path": "absent.model"}}, r"tokenizer absent.model \(/.*/absent.model\) cannot be read"),
        ({"paths": ["absent.txt"]}, "absent.txt"),
        ({"source": "hub", "name": "absent/folder/name"}, "absent/folder/name"),
    ],
)
def test_a_failure_is_one_line_and_leaves_nothing(corpus: Corpus, change: dict, message: str) -> None:
    """And a start with the mistake mended works, as does the same mistake again."""
    for _ in range(2):
        with pytest.raises(UserError, match=message) as caught:
            corpus.prepare(**change)
        assert "\n" not in str(caught.value)
        assert corpus.left_over() == []
    assert corpus.prepare().train_tokens > 0


def test_a_cache_that_is_no_folder(corpus: Corpus) -> None:
    """Permissions do not stop root, so a file in the way stands for a folder that cannot be written."""
    corpus.cache.write_text("in the way")
    with pytest.raises(UserError, match=r"data.cache_dir is .*cache, and it cannot be used"):
        corpus.prepare()
    assert corpus.cache.read_text() == "in the way"


def test_a_full_disk(corpus: Corpus) -> None:
    """A limit on the size of files fails a write in the middle, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"data.cache_dir is .*cache, and it cannot be used") as caught:
            corpus.prepare()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert corpus.left_over() == []
    assert corpus.prepare().train_tokens > 0


@pytest.mark.parametrize("name", ["train.arrow", "tokenizer.model", "prepared.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found(corpus: Corpus, name: str, damage: str) -> None:
    """One flipped byte would otherwise train on other tokens without a word."""
    path = corpus.prepare().folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with pytest.raises(UserError, match=r"delete this folder and it is prepared again$") as caught:
        corpus.prepare()
    assert "\n" not in str(caught.value)


def test_prepared_tokenizer_is_in_the_folder(corpus: Corpus) -> None:
    """Tools find the model beside the data, in SentencePiece's own format."""
    prepared = corpus.prepare()
    assert Tokenizer.load(prepared.folder / "tokenizer.model").fingerprint == prepared.tokenizer.fingerprint
