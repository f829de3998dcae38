"""The text is exactly what the user named: every file once, every character as it is, errors where they are."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inrank_dist.data import readers, stored
from inrank_dist.data.corpus import open_source
from inrank_dist.data.documents import Corpus, choose_documents
from inrank_dist.data.globs import find_files
from inrank_dist.data.readers import SUFFIXES, read_file
from inrank_dist.data.settings import DataSettings
from inrank_dist.data.stored import store
from inrank_dist.runtime.errors import UserError


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(path: Path, *rows: Any) -> Path:
    return put(path, "".join(json.dumps(row) + "\n" for row in rows))


def texts(path: Path, column: str = "text", separator: str | None = None) -> list[str]:
    """The documents of a file."""
    documents, text = [], ""
    for piece in read_file(path, text_column=column, document_separator=separator):
        text += piece.text
        if piece.last:
            documents.append(text)
            text = ""
    assert text == ""
    return documents


def read(tmp_path: Path, **settings: Any) -> Corpus:
    data = DataSettings(source="files", cache_dir=str(tmp_path / "cache"), **settings)
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return choose_documents(open_source(data).read(scratch, False), data)


# Which files


def test_every_matched_file_is_read_once(tmp_path: Path) -> None:
    """A name that is itself a pattern is the file of that name, not the files that it would match."""
    for name, text in (("[a/doc[1].txt", "alpha"), ("[a/doc1.txt", "beta"), ("[a/z.txt", "gamma"), ("v.txt", "v")):
        put(tmp_path / name, text)
    held_out = [str(tmp_path / "v.txt")]
    corpus = read(tmp_path, paths=[str(tmp_path / "[a" / "*.txt")], validation_paths=held_out)
    assert sorted(corpus.train) == ["alpha", "beta", "gamma"]
    corpus = read(tmp_path, paths=[str(tmp_path / "[a" / "doc[1].txt")], validation_paths=held_out)
    assert [*corpus.train] == ["alpha"]


@pytest.mark.parametrize("name", ["val*.txt", "[en]/a.txt", "a::b.txt", "zip:x.txt", "http:/x/y.txt", "#?%20 .txt"])
def test_names_are_not_read_as_patterns_or_addresses(tmp_path: Path, name: str) -> None:
    put(tmp_path / name, "the text")
    put(tmp_path / "val-secret.txt", "held out")
    corpus = read(tmp_path, paths=[str(tmp_path / name)], validation_paths=[str(tmp_path / "val-secret.txt")])
    assert [*corpus.train] == ["the text"] and [*corpus.validation] == ["held out"]


def test_patterns(tmp_path: Path) -> None:
    """As Python's glob, which users know; in the order of the names, whatever the order of the patterns."""
    names = ["a.txt", "b.txt", "ab.txt", ".hidden.txt", "sub/c.txt", "sub/deep/d.txt", ".git/e.txt", "f.jsonl"]
    for name in names:
        put(tmp_path / name, "x")

    def found(*patterns: str) -> list[str]:
        paths = find_files("paths", [str(tmp_path / pattern) for pattern in patterns], SUFFIXES)
        return [path.relative_to(tmp_path).as_posix() for path in paths]

    assert found("?.txt") == ["a.txt", "b.txt"]
    assert found("[!a]*.txt") == ["b.txt"]
    assert found("**/*.txt") == ["a.txt", "ab.txt", "b.txt", "sub/c.txt", "sub/deep/d.txt"]
    assert found("**") == ["a.txt", "ab.txt", "b.txt", "f.jsonl", "sub/c.txt", "sub/deep/d.txt"]
    assert found("*/*.txt") == ["sub/c.txt"] and found("s*/**/d.txt") == ["sub/deep/d.txt"]
    assert found(".*.txt") == [".hidden.txt"]
    assert found("sub/*.txt", "b.txt", "*.txt") == ["a.txt", "ab.txt", "b.txt", "sub/c.txt"]


def test_a_file_of_several_names_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative and absolute, through a linked folder and a link that leads back up: once in training."""
    put(tmp_path / "text" / "a.txt", "alpha")
    put(tmp_path / "v.txt", "v")
    (tmp_path / "link").symlink_to(tmp_path / "text")
    (tmp_path / "text" / "loop").symlink_to(tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    patterns = ["text/*.txt", str(tmp_path / "text" / "*.txt"), "link/a.txt", "text/**/*.txt", "./text/../text/a.txt"]
    assert [*read(tmp_path, paths=patterns, validation_paths=["v.txt"]).train] == ["alpha"]


@pytest.mark.parametrize("other", ["text/a.txt", "link/a.txt", "{here}/text/a.txt", "linked.txt"])
def test_one_file_in_both_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    """Whatever names it has: validation on training text measures nothing."""
    put(tmp_path / "text" / "a.txt", "alpha")
    (tmp_path / "link").symlink_to(tmp_path / "text")
    (tmp_path / "linked.txt").symlink_to(tmp_path / "text" / "a.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"both match .*; write globs with no file in common"):
        read(tmp_path, paths=["text/*.txt"], validation_paths=[other.format(here=tmp_path)])


def test_one_document_in_both_splits(tmp_path: Path) -> None:
    """Copies of a file, and the same row in two files, are counted, and ``prepare`` tells it."""
    train = [put(tmp_path / "a.txt", "a copy"), lines(tmp_path / "t.jsonl", {"text": "a row"}, {"text": "another"})]
    held_out = [put(tmp_path / "b.txt", "a copy"), lines(tmp_path / "v.jsonl", {"text": "a row"}, {"text": "new"})]
    corpus = read(tmp_path, paths=[*map(str, train)], validation_paths=[*map(str, held_out)])
    assert corpus.in_both == (2, len("a copy") + len("a row"))
    corpus = read(tmp_path, paths=[*map(str, train[:1])], validation_paths=[*map(str, held_out[1:])])
    assert corpus.in_both == (0, 0)


def test_what_cannot_be_looked_at_is_told(tmp_path: Path) -> None:
    """A file that is left out in silence is a smaller corpus than the user named."""
    put(tmp_path / "a.txt", "alpha")
    (tmp_path / "b.txt").symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match=r"b\.txt, a broken link"):
        find_files("paths", [str(tmp_path / "*.txt")], SUFFIXES)
    (tmp_path / "b.txt").unlink()
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"pipe\.txt', which is not a regular file"):
        find_files("paths", [str(tmp_path / "pipe.txt")], SUFFIXES)


def test_a_folder_that_fails_while_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, who may read everything; the fault of the file system is put in its place."""
    put(tmp_path / "sub" / "a.txt", "alpha")
    put(tmp_path / "stale" / "b.txt", "beta")
    listdir = os.listdir

    def fail(folder: Path) -> list[str]:
        if Path(folder).name == "stale":
            raise OSError(116, "Stale file handle")
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", fail)
    with pytest.raises(UserError, match=r"leads to .*stale, which cannot be read \(Stale file handle\)"):
        find_files("paths", [str(tmp_path / "**" / "*.txt")], SUFFIXES)


def test_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with a user that is in no passwd; a file whose name begins with ~ is that file."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "~" / "a.txt", "alpha")
    assert find_files("paths", ["~/a.txt"], SUFFIXES) == [Path("~/a.txt")]
    with pytest.raises(UserError, match=r"^data\.paths is '~/b.txt', and nothing says where that home folder is"):
        find_files("paths", ["~/b.txt"], SUFFIXES)
    with pytest.raises(UserError, match=r"^data\.cache_dir is '~/.cache/inrank_dist'"):
        open_source(DataSettings(source="files", paths=["~/a.txt"]))


# What is in them


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_text_is_kept_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """One rule for all formats: line ends stay, a byte-order mark at the start does not; wherever blocks end."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", block)
    monkeypatch.setattr(stored, "BLOCK_BYTES", block)
    text = "one\r\ntwo\rthree\n\n \u00e9\U0001f600\x85\u2028\x00 \ufeffmark\r\n"
    files = [put(tmp_path / "a.txt", text), put(tmp_path / "b.txt", "\ufeff" + text)]
    files += [lines(tmp_path / "c.jsonl", {"text": text}), lines(tmp_path / "d.jsonl", {"text": "\ufeff" + text})]
    files.append(put(tmp_path / "e.jsonl", b"\xef\xbb\xbf" + (tmp_path / "c.jsonl").read_bytes()))
    files.append(put(tmp_path / "f.jsonl", (tmp_path / "c.jsonl").read_bytes().replace(b"\n", b"\r\n")))
    pq.write_table(pa.table({"text": [text, "\ufeff" + text]}), tmp_path / "g.parquet")
    files.append(tmp_path / "g.parquet")
    for path in files:
        pieces = read_file(path, text_column="text", document_separator=None)
        assert {*store(pieces, tmp_path / "stored", lambda done: None)} == {text}, path


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n", "aa", "aba"])
@pytest.mark.parametrize("block", [1, 3, 16, 1 << 20])
def test_a_text_file_of_many_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str, block: int
) -> None:
    """``data.document_separator``: as ``str.split`` of the whole file, wherever blocks end."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", block)
    text = "aaa\nababa<|endoftext|>\n\u00e9<|endof<|endoftext|><|endoftext|>abaab aaaa\n"
    assert texts(put(tmp_path / "a.txt", text), separator=separator) == text.split(separator)


def test_document_separator_makes_documents(tmp_path: Path) -> None:
    """They are held out, shuffled and dropped where they are empty like any others."""
    path = put(tmp_path / "a.txt", "<|endoftext|>".join(f"story {n}" for n in range(40)) + "<|endoftext|>")
    corpus = read(tmp_path, paths=[str(path)], document_separator="<|endoftext|>", validation_fraction=0.2)
    assert len(corpus.train) + len(corpus.validation) == 40
    with pytest.raises(UserError, match=r"write data\.document_separator if one file holds many"):
        read(tmp_path, paths=[str(path)])
    with pytest.raises(UserError, match=r"data\.document_separator is ''; write"):
        DataSettings(document_separator="")


@pytest.mark.parametrize(
    "others",
    [
        [{"n": 1}, {"n": 1, "new": "field"}],
        [{"n": None}, {"n": "text"}],
        [{"n": 1}, {"n": 1.5}],
        [{"n": [1]}, {"n": {"a": 1}}],
        [{"n": "2020-01-01"}, {"n": 3}],
    ],
)
def test_only_the_text_column_counts(tmp_path: Path, others: list[dict[str, Any]]) -> None:
    """Other fields may change as they like, also far behind in the file, where a guessed schema has long been fixed."""
    rows = [{"text": f"2020-01-{day:02}", **others[0]} for day in range(1, 29)] * 1000 + [{"text": "last", **others[1]}]
    assert texts(lines(tmp_path / "a.jsonl", *rows)) == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 5}', r"'text', which is a number in line 3 of .*a\.jsonl; write a column of strings"),
        ('{"text": ["x"]}', "which is a list in line 3"),
        ('{"text": "x"', "line 3 is not JSON"),
        ('["x"]', r"line 3 is a list and not an object; write lines such as \{"),
        ('"x"', "line 3 is text and not an object"),
        ("[" * 100_000, "line 3 is not JSON"),
        ('{"text": "a\\ud800"}', r"line 3 of .* holds half of a character \('\\ud800', a lone surrogate\)"),
        (b'{"text": "\xe9"}', r"not UTF-8 \(line 3, byte 10 of it\)"),
    ],
)
def test_an_error_names_the_line(tmp_path: Path, line: str | bytes, message: str) -> None:
    """Counted as an editor does, empty lines too."""
    line = line.encode() if isinstance(line, str) else line
    path = put(tmp_path / "a.jsonl", b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(UserError, match=message) as caught:
        texts(path)
    assert "\n" not in str(caught.value)


def test_rows_without_text_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[dict[str, Any]] = [{"text": "a"}, {"text": None}, {"other": 1}, {"text": ""}]
    caplog.set_level(logging.INFO, "inrank_dist")
    assert texts(lines(tmp_path / "a.jsonl", *rows)) == ["a", ""]
    told = f"warning: 2 of 4 rows of {tmp_path}/a.jsonl have no text in 'text' and are skipped (first: line 2)"
    assert caplog.messages == [told]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_parquet_columns_of_strings(tmp_path: Path, kind: pa.DataType) -> None:
    """However a writer stores strings; other columns of any type, nulls, several row groups."""
    values = [*(f"2020-01-{day % 28 + 1:02}" for day in range(300)), None, "last"]
    column = pa.array(values, pa.string())
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    other = pa.array([{"a": [1]}] * len(values))
    pq.write_table(pa.table({"other": other, "text": column}), tmp_path / "a.parquet", row_group_size=100)
    assert texts(tmp_path / "a.parquet") == [value for value in values if value is not None]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1, 2]), r"'text', which is int64 in .*a\.parquet; write a column of strings"),
        (pa.array([b"x", b"y"]), "which is binary"),
        (pa.array([["x"], []]), r"which is list<.*> in"),
        (pa.array([b"good", b"\xe9"]).cast(pa.string(), safe=False), "a.parquet cannot be read"),
    ],
)
def test_parquet_that_is_no_text(tmp_path: Path, column: pa.Array, message: str) -> None:
    try:
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    except pa.ArrowInvalid:
        pytest.skip("this pyarrow does not write it")
    with pytest.raises(UserError, match=message) as caught:
        texts(tmp_path / "a.parquet")
    assert "\n" not in str(caught.value)


def test_empty_shards_are_skipped_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Writers of data sets leave them; the other shards are text all the same."""
    caplog.set_level(logging.INFO, "inrank_dist")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.null())}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": ["full"]}), tmp_path / "c.parquet")
    for name in ("d.txt", "e.jsonl", "f.parquet"):
        put(tmp_path / name, "")
    put(tmp_path / "v.jsonl", '{"text": "held out"}\n')
    paths = [str(tmp_path / pattern) for pattern in ("[a-f].txt", "[a-f].jsonl", "[a-f].parquet")]
    corpus = read(tmp_path, paths=paths, validation_paths=[str(tmp_path / "v.jsonl")])
    assert [*corpus.train] == ["full"]
    empty = ("d.txt", "e.jsonl", "a.parquet", "b.parquet", "f.parquet")
    assert caplog.messages == [f"{tmp_path / name} holds no text and is skipped" for name in empty]


def test_a_hub_folder_whose_name_is_a_pattern(tmp_path: Path) -> None:
    """``datasets`` would look for other folders, and perhaps find one."""
    lines(tmp_path / "set[1]" / "train.jsonl", {"text": "right"})
    lines(tmp_path / "set1" / "train.jsonl", {"text": "wrong"})
    data = DataSettings(source="hub", name=str(tmp_path / "set[1]"), validation_split=None)
    with pytest.raises(UserError, match=r"data\.name is .*set\[1\]', .* rename it, or write data.source: files"):
        open_source(data)
