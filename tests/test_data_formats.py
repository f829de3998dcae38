"""Every format gives the tokens of the plain text that it was made from."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inrank_dist.data import DataSettings, TokenizerSettings, prepare
from inrank_dist.data.readers import read_file, suffix_of, type_of
from inrank_dist.runtime.errors import UserError

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "rain", "falls", "on", "stones"]
DOCUMENTS = [" ".join(WORDS[(index * step) % len(WORDS)] for step in range(40)) + f" {index}\n" for index in range(30)]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def jsonl(make: Callable[[str], dict[str, Any]]) -> bytes:
    return "".join(json.dumps(make(text)) + "\n" for text in DOCUMENTS).encode()


def flat(text: str) -> dict[str, Any]:
    return {"text": text}


def nested(text: str) -> dict[str, Any]:
    return {"a": {"b": text, "c": 1}, "text": "not this"}


def save(folder: Path, how: str) -> dict[str, Any]:
    """Write the documents; the settings that read them."""
    if how == "save_to_disk":
        data = datasets.Dataset.from_list([flat(text) for text in DOCUMENTS])
        datasets.DatasetDict({"train": data, "test": data}).save_to_disk(folder / "set")
        return {"source": "hub", "name": str(folder / "set"), "validation_split": None}
    if how == "save_to_disk, one split, nested":
        datasets.Dataset.from_list([nested(text) for text in DOCUMENTS]).save_to_disk(folder / "set")
        return {"source": "hub", "name": str(folder / "set"), "validation_split": None, "text_column": "a.b"}
    suffix, column, make = how.split()[0], "text", flat
    if "nested" in how:
        column, make = "a.b", nested
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([make(text) for text in DOCUMENTS]), folder / "a.parquet")
    elif suffix.startswith(".jsonl"):
        pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstd}[suffix]
        (folder / f"a{suffix}").write_bytes(pack(jsonl(make)))
    else:
        pack = {".txt": bytes, ".txt.gz": gzip.compress, ".txt.zst": zstd}[suffix]
        for index, text in enumerate(DOCUMENTS):
            (folder / f"{index:02}{suffix}").write_bytes(pack(text.encode()))
    return {"source": "files", "paths": [str(folder / f"*{suffix}")], "text_column": column}


@pytest.mark.parametrize(
    "how",
    [
        ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl nested", ".jsonl.gz nested", ".parquet",
        ".parquet nested", "save_to_disk", "save_to_disk, one split, nested",
    ],
)  # fmt: skip
def test_the_tokens_are_those_of_plain_text(tmp_path: Path, how: str) -> None:
    found = []
    for each in (".txt", how):
        folder = tmp_path / each.replace(" ", "")
        folder.mkdir()
        settings = DataSettings(cache_dir=str(tmp_path / "cache"), validation_fraction=0.2, **save(folder, each))
        found.append(prepare(settings, TokenizerSettings(vocab_size=300), 16, progress=False))
    plain, other = found
    assert plain.tokenizer.fingerprint == other.tokenizer.fingerprint
    for part in ("train", "validation"):
        assert getattr(plain, part)["input_ids"][:] == getattr(other, part)["input_ids"][:]
    assert plain.fingerprint == other.fingerprint and plain.train_tokens > 1000


def texts(path: Path, column: str = "text") -> list[str]:
    return [piece.text for piece in read_file(path, text_column=column, document_separator=None) if piece.text]


def test_suffixes() -> None:
    assert [suffix_of(Path(name)) for name in ("a.b.txt", "a.txt.gz", "a.jsonl.zst")] == [
        ".txt",
        ".txt.gz",
        ".jsonl.zst",
    ]
    assert type_of(Path("a.b.jsonl.gz")) == ".jsonl"


def test_a_gzip_file_of_several_members(tmp_path: Path) -> None:
    """As pigz and cat write them."""
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    assert "".join(texts(path)) == "one two"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_large_files_are_read_in_blocks(tmp_path: Path, suffix: str) -> None:
    content = ("a line of text\n" * 200_000).encode()
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".gz" else zstd(content))
    pieces = texts(path)
    assert len(pieces) > 2 and "".join(pieces).encode() == content


@pytest.mark.parametrize("suffix", [".txt.gz", ".txt.zst", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "noise", "another type"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    content = jsonl(flat) * 50
    packed = gzip.compress(content) if suffix.endswith("gz") else zstd(content)
    path = tmp_path / f"a{suffix}"
    half = len(packed) // 2
    path.write_bytes(
        {"cut": packed[:half], "noise": packed[:half] + bytes(50) + packed[half:], "another type": content}[damage]
    )
    with pytest.raises(UserError, match=rf"a\{suffix} ") as raised:
        texts(path)
    assert "\n" not in str(raised.value)


def test_a_column_with_a_dot_in_its_name_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"a.b": "dotted", "a": {"b": "nested"}}) + "\n")
    assert texts(path, "a.b") == ["dotted"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"text_column": "a.x"}, r"data.text_column is 'a.x', and .* has the columns a, text; write one of them"),
        ({"text_column": "a.c"}, r"data.text_column is 'a.c', which is .*; write a column of strings"),
        ({"text_column": "a"}, r"data.text_column is 'a', which is .*; write a column of strings"),
    ],
)
@pytest.mark.parametrize("how", [".jsonl nested", ".parquet nested", "save_to_disk, one split, nested"])
def test_a_column_that_is_no_text(tmp_path: Path, how: str, settings: dict[str, Any], said: str) -> None:
    data = DataSettings(cache_dir=str(tmp_path / "cache"), **save(tmp_path, how) | settings)
    with pytest.raises(UserError, match=said):
        prepare(data, TokenizerSettings(vocab_size=300), 16, progress=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_split": "train[:10%]"}, r"data.train_split is 'train\[:10%\]', and .* has the splits train, test"),
        ({"validation_split": "validation"}, "has the splits train, test; write one of them, or null to hold out"),
    ],
)
def test_splits_of_a_saved_data_set(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    data = DataSettings(cache_dir=str(tmp_path / "cache"), **save(tmp_path, "save_to_disk") | changes)
    with pytest.raises(UserError, match=said):
        prepare(data, TokenizerSettings(vocab_size=300), 16, progress=False)
