"""Text is read whole, split without leaks, and refused with a reason where it cannot be used."""

import json
import os
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pandas
import pytest

from inrank_dist.data import hashing
from inrank_dist.data.corpus import open_source
from inrank_dist.data.documents import Corpus, choose_documents
from inrank_dist.data.settings import DataSettings
from inrank_dist.runtime.errors import UserError


def read(tmp_path: Path, **settings: Any) -> Corpus:
    data = DataSettings(cache_dir=str(tmp_path / "cache"), **settings)
    scratch = Path(tempfile.mkdtemp(dir=tmp_path))
    return choose_documents(open_source(data).read(scratch, False), data)


def identity(tmp_path: Path, **settings: Any) -> str:
    return open_source(DataSettings(cache_dir=str(tmp_path / "cache"), **settings)).identity


def write(path: Path, content: Any) -> str:
    """A .txt, .jsonl or .parquet file of ``content``: its text, or its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pandas.DataFrame(content).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(str(content), newline="")
    return str(path)


def text_rows(*texts: str) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def hub_folder(path: Path) -> str:
    write(path / "train.jsonl", text_rows("one", "two", "three"))
    write(path / "validation.jsonl", text_rows("held out"))
    write(path / "test.jsonl", text_rows("never read"))
    return str(path)


# The standard library


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return read(tmp_path_factory.mktemp("stdlib"))


def test_stdlib_is_the_library_without_its_tests(stdlib: Corpus) -> None:
    """The first run's corpus must be there on every machine, and be the library's own code."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = {*stdlib.train, *stdlib.validation}
    assert (root / "json" / "decoder.py").read_text() in texts
    for left_out in ("test/test_json/__init__.py", "site-packages/pytest/__init__.py"):
        if (root / left_out).is_file():
            assert (root / left_out).read_text() not in texts
    assert 5e6 < stdlib.train.total_bytes < 50e6
    assert "" not in texts


def test_stdlib_split(stdlib: Corpus) -> None:
    """Each file is on one side, the share held out is about the one asked for, and both are the same every time."""
    assert not {*stdlib.train} & {*stdlib.validation}
    share = stdlib.validation.total_bytes / (stdlib.train.total_bytes + stdlib.validation.total_bytes)
    assert 0.02 <= share < 0.04


def test_stdlib_is_deterministic(stdlib: Corpus, tmp_path: Path) -> None:
    """Processes on several machines read for themselves and must agree."""
    again = read(tmp_path)
    assert again.digest == stdlib.digest
    assert [*again.train] == [*stdlib.train]


def test_stdlib_skips_other_encodings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some Pythons ship sources that declare latin-1; the rest of the library is still good text."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    for name, content in {
        "a.py": b"# plain\n",
        "b.py": b"# marked\n".join([b"\xef\xbb\xbf", b""]),
        "c.py": b"# -*- coding: latin-1 -*-\n# \xe9\n",
        "d.py": b"# \xe9\n",
        "e.py": b"",
        "tests/f.py": b"# left out\n",
        "idlelib/idle_test/g.py": b"# left out\n",
        "h.txt": b"left out\n",
        "pkg/i.py": b"# in a package\n",
    }.items():
        write(tmp_path / "lib" / name, "")
        (tmp_path / "lib" / name).write_bytes(content)
    corpus = read(tmp_path, validation_fraction=0.3)
    texts = [*corpus.train, *corpus.validation]
    assert sorted(texts) == ["# in a package\n", "# marked\n", "# plain\n"]


# Splitting, shuffling, capping


def test_held_out_documents_do_not_move_when_others_come(tmp_path: Path) -> None:
    """By hash, not by place: an added file must not put last week's validation text into training."""
    for name in range(100):
        write(tmp_path / f"{name}.txt", f"document {name} " * 5)
    few = {*read(tmp_path, source="files", paths=[str(tmp_path / "[0-8]*.txt")], validation_fraction=0.1).train}
    many = read(tmp_path, source="files", paths=[str(tmp_path / "*.txt")], validation_fraction=0.1)
    assert len(few & {*many.validation}) <= 2


def test_copies_stay_on_one_side(tmp_path: Path) -> None:
    """A copied document on both sides would be validation on training text."""
    for name in range(60):
        write(tmp_path / f"{name}.txt", f"document {name % 20}.")
    corpus = read(tmp_path, source="files", paths=[str(tmp_path / "*.txt")], validation_fraction=0.2)
    assert not {*corpus.train} & {*corpus.validation}
    assert len(corpus.train) + len(corpus.validation) == 60


def test_a_share_far_from_the_one_asked_for_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in range(8):
        write(tmp_path / f"{name}.txt", f"book {name} " * 100)
    read(tmp_path, source="files", paths=[str(tmp_path / "*.txt")], validation_fraction=0.12)
    assert not caplog.messages
    read(tmp_path, source="files", paths=[str(tmp_path / "*.txt")])
    (message,) = caplog.messages
    assert "0.12 of the text is held out, and data.validation_fraction is 0.02" in message
    assert "1 of 8 here; data.validation_bytes: 112 holds out exactly" in message


def test_one_big_document_is_not_held_out(tmp_path: Path) -> None:
    """Otherwise validation could become most of the corpus."""
    write(tmp_path / "big.txt", "big " * 5000)
    for name in range(50):
        write(tmp_path / f"{name}.txt", f"document {name} " * 10)
    corpus = read(tmp_path, source="files", paths=[str(tmp_path / "*.txt")])
    assert max(map(len, [*corpus.train])) == 20000
    assert corpus.validation.total_bytes < 1000


@pytest.mark.parametrize("most", [1, 7, 100, 101, 2050, 10**6])
def test_max_bytes_takes_a_prefix_of_one_order(tmp_path: Path, most: int) -> None:
    """A small run uses a subset of a large run's text, cut at a character, and never more than was said."""
    for name in range(40):
        write(tmp_path / "train" / f"{name}.txt", f"{name} a\u00e9\U0001f600 " * 10)
    write(tmp_path / "valid.txt", "held out " * 1000)
    settings = {
        "source": "files",
        "paths": [str(tmp_path / "train" / "*.txt")],
        "validation_paths": [str(tmp_path / "valid.txt")],
    }
    whole, part = read(tmp_path, **settings), read(tmp_path, max_bytes=most, **settings)
    text = "".join([*whole.train])
    assert "".join([*part.train]) == text.encode()[:most].decode(errors="ignore")
    assert part.train.total_bytes == len("".join([*part.train]).encode()) <= most
    assert part.validation.total_bytes == min(most, 9000)
    assert (part.digest == whole.digest) == (most == 10**6)


# Files


def test_files_of_all_kinds_together(tmp_path: Path) -> None:
    """One document a text file, one a row of the others; other columns may differ; empty ones are dropped."""
    paths = [
        write(tmp_path / "a.txt", "first line\n\nsecond line\n"),
        write(tmp_path / "b.jsonl", [{"text": "row", "n": 1}, {"text": "", "n": 2}]),
        write(tmp_path / "c.jsonl", [{"id": "x", "text": "other columns"}]),
        write(tmp_path / "d.parquet", {"text": ["from parquet", None], "m": [1.5, 2.5]}),
        write(tmp_path / "empty.txt", ""),
        write(tmp_path / "empty.jsonl", []),
    ]
    valid = write(tmp_path / "v.txt", "held out")
    corpus = read(tmp_path, source="files", paths=paths, validation_paths=[valid])
    assert sorted([*corpus.train]) == ["first line\n\nsecond line\n", "from parquet", "other columns", "row"]
    assert [*corpus.validation] == ["held out"]


def test_join_rows_keeps_the_order(tmp_path: Path) -> None:
    """Rows that continue each other may not be shuffled."""
    lines = [f"line {n}\n" for n in range(50)]
    train, valid = (write(tmp_path / f"{name}.jsonl", text_rows(*lines)) for name in ("t", "v"))
    corpus = read(tmp_path, source="files", paths=[train], validation_paths=[valid], join_rows=True)
    assert [*corpus.train] == lines


def test_moved_files_are_the_same_text(tmp_path: Path) -> None:
    """A checkpoint must resume on a machine that keeps the corpus elsewhere."""
    for folder in ("here", "there"):
        for name in range(5):
            write(tmp_path / folder / f"{name}.txt", f"document {name}")
    here, there = ({"source": "files", "paths": [str(tmp_path / name / "*.txt")]} for name in ("here", "there"))
    assert identity(tmp_path, **here) == identity(tmp_path, **there)
    assert read(tmp_path, **here).digest == read(tmp_path, **there).digest


@pytest.mark.parametrize("remembered", [False, True])
def test_an_edit_that_keeps_size_and_time_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remembered: bool
) -> None:
    """``cp -p`` and ``touch -r`` keep both; the memory of hashes of big files must not be fooled either."""
    if remembered:
        monkeypatch.setattr(hashing, "REMEMBER_FROM_BYTES", 0)
        monkeypatch.setattr(hashing, "CLOCK_RESOLUTION_S", -1.0)
    settings = {"source": "files", "paths": [write(tmp_path / "a.txt", "before")]}
    first = identity(tmp_path, **settings)
    assert identity(tmp_path, **settings) == first
    assert (tmp_path / "cache" / "hashes.json").exists() == remembered
    status = (tmp_path / "a.txt").stat()
    write(tmp_path / "a.txt", "behind")
    os.utime(tmp_path / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert identity(tmp_path, **settings) != first


def test_a_file_that_changes_before_it_is_read(tmp_path: Path) -> None:
    """Its new text would be filed under the hash of the old one and be found stale for ever."""
    data = DataSettings(source="files", paths=[write(tmp_path / "a.txt", "before")])
    source = open_source(data)
    write(tmp_path / "a.txt", "after that")
    with pytest.raises(UserError, match=r"a\.txt changed while it was read"):
        source.read(tmp_path, False)


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ({}, {"paths": ["absent.txt"]}, r"data.paths has '.*absent.txt', which does not exist"),
        ({}, {"paths": ["*.txt"]}, r"data.paths has '.*\*.txt', which matches no file"),
        ({"d/a.txt": "x"}, {"paths": ["d"]}, r"data.paths has '.*d', a folder; write '.*d/\*\*/\*.txt'"),
        ({"a.txt": "x"}, {"paths": ["a.txt"], "validation_paths": ["b.txt"]}, "data.validation_paths has"),
        ({"a.txt": "x"}, {"paths": ["a.txt"], "validation_paths": ["*.txt"]}, r"both match .*a\.txt"),
        ({"a.txt": "x", "b.csv": "y"}, {"paths": ["*"]}, r"matches .*b\.csv, .* only .txt, .jsonl, .parquet"),
        ({"a.txt": "x"}, {"paths": ["a.txt"]}, "has 1 different documents, too few"),
        ({"a.txt": "x", "b.txt": "x"}, {"paths": ["*.txt"]}, "has 1 different documents, too few"),
        ({"a.txt": "", "b.jsonl": []}, {"paths": ["*"]}, "no training text"),
        ({"a.txt": "", "v.txt": "x"}, {"paths": ["a.txt"], "validation_paths": ["v.txt"]}, "no training text"),
        ({"a.txt": "x", "v.txt": ""}, {"paths": ["a.txt"], "validation_paths": ["v.txt"]}, "no validation text"),
        ({"a.jsonl": [{"body": "x"}]}, {"paths": ["a.jsonl"]}, r"data.text_column is 'text', .* the columns body"),
        ({"a.parquet": {"text": [1]}}, {"paths": ["a.parquet"]}, r"'text', which is int64 in .*a\.parquet"),
        ({"a.parquet": {"text": [["x"]]}}, {"paths": ["a.parquet"]}, r"which is .* in .*a\.parquet"),
        ({"x.txt": "not json", "a.jsonl": None}, {"paths": ["a.jsonl"]}, r"a\.jsonl cannot be read: "),
        ({"x.txt": "not parquet", "a.parquet": None}, {"paths": ["a.parquet"]}, r"a\.parquet cannot be read: "),
        ({"a.txt": "\u00e9", "b.txt": "y"}, {"paths": ["*.txt"], "max_bytes": 1}, None),
    ],
)
def test_files_that_cannot_be_used(
    tmp_path: Path, files: dict[str, Any], settings: dict[str, Any], message: str | None
) -> None:
    """Each names the setting and the file; none is a traceback from deep inside a library."""
    for name, content in files.items():
        if content is None:
            (tmp_path / "in" / "x.txt").rename(tmp_path / "in" / name)
        else:
            write(tmp_path / "in" / name, content)
    for key in ("paths", "validation_paths"):
        if key in settings:
            settings = {**settings, key: [str(tmp_path / "in" / pattern) for pattern in settings[key]]}
    with pytest.raises(UserError, match=message or "less than one character") as caught:
        read(tmp_path, source="files", **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_text_that_is_not_utf8(tmp_path: Path, suffix: str) -> None:
    """The file and the byte are named, also where a character straddles the blocks that are read."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"x" * ((1 << 20) - 1) + "\u00e9".encode() + b"\xe9 and on")
    with pytest.raises(UserError, match=rf"a{suffix} is not UTF-8 \(byte {(1 << 20) + 1}\)"):
        identity(tmp_path, source="files", paths=[str(path)])


# The hub


def test_hub_reads_a_local_data_set(tmp_path: Path) -> None:
    """The same call that downloads; the test split is never read."""
    corpus = read(tmp_path, source="hub", name=hub_folder(tmp_path / "set"))
    assert sorted([*corpus.train]) == ["one", "three", "two"]
    assert [*corpus.validation] == ["held out"]


def test_hub_configurations_splits_and_columns(tmp_path: Path) -> None:
    """As on the hub, a card names configurations; slices of splits work; the column is chosen."""
    for config in ("small", "large"):
        write(tmp_path / "set" / config / "part.parquet", {"body": [f"{config} {n}" for n in range(10)]})
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/part.parquet\n" for name in ("small", "large"))
    write(tmp_path / "set" / "README.md", f"---\nconfigs:\n{configs}---\n")
    common = {"source": "hub", "name": str(tmp_path / "set"), "config": "large", "text_column": "body"}
    corpus = read(tmp_path, train_split="train[:80%]", validation_split="train[80%:]", **common)
    assert sorted([*corpus.train]) == [f"large {n}" for n in range(8)]
    assert sorted([*corpus.validation]) == ["large 8", "large 9"]
    held_out = read(tmp_path, validation_split=None, validation_fraction=0.2, **common)
    assert len(held_out.train) == 8 and len(held_out.validation) == 2


def test_hub_notices_an_edit_of_a_local_data_set(tmp_path: Path) -> None:
    """``datasets`` itself looks only at times and would serve the old text from its cache."""
    name = hub_folder(tmp_path / "set")
    before = identity(tmp_path, source="hub", name=name)
    first = read(tmp_path, source="hub", name=name)
    changed = tmp_path / "set" / "train.jsonl"
    status = changed.stat()
    changed.write_text(changed.read_text().replace("one", "ONE"))
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert identity(tmp_path, source="hub", name=name) != before
    data = DataSettings(source="hub", name=name, cache_dir=str(tmp_path / "cache"))
    (tmp_path / "other").mkdir()
    again = choose_documents(open_source(data).read(tmp_path / "other", False), data)
    assert "ONE" in [*again.train] and "one" in [*first.train]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"validation_split": "dev"},
            "data.name is .*set', whose split 'dev' cannot be read: .* data.validation_split",
        ),
        ({"text_column": "body"}, "data.text_column is 'body', .* the columns text"),
        ({"config": "large"}, "whose split 'train' cannot be read: .*large.* data.config"),
    ],
)
def test_hub_settings_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """What the data set does not have is said in one line."""
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, source="hub", name=hub_folder(tmp_path / "set"), **settings)
    assert "\n" not in str(caught.value)


def test_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster node without network is common; the hub itself does not exist here, so it is declared offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"data.name is 'nobody/nothing', whose split 'train' cannot be read: "
    ) as caught:
        read(tmp_path, source="hub", name="nobody/nothing")
    assert "\n" not in str(caught.value)


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "files"}, "data.paths is empty"),
        ({"source": "hub"}, "data.name is None"),
        ({"validation_fraction": 0.0}, "data.validation_fraction is 0.0"),
        ({"validation_fraction": 0.9}, "data.validation_fraction is 0.9"),
        ({"max_bytes": 0}, "data.max_bytes is 0; write 1 or more"),
        ({"num_workers": 0}, "data.num_workers is 0; write 1 or more"),
        ({"source": "hub", "name": "a/b", "validation_split": "test"}, "the test split is not for validation"),
        ({"source": "hub", "name": "a/b", "validation_split": "validation+test[:5%]"}, "the test split"),
        ({"source": "hub", "name": "a/b", "validation_split": "train"}, "the same as data.train_split"),
        ({"source": "files", "paths": ["a"], "join_rows": True}, "data.validation_paths is empty"),
        (
            {"source": "hub", "name": "a/b", "join_rows": True, "validation_split": None},
            "data.validation_split is empty",
        ),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    """Conflicts are found before any file is opened."""
    with pytest.raises(UserError, match=message) as caught:
        DataSettings(**settings)
    assert "\n" not in str(caught.value)
