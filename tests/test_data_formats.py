"""Every format gives the tokens of the plain text that it was made from."""

import gzip
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inrank_dist.data import DataSettings, Prepared, TokenizerSettings, prepare
from inrank_dist.data.readers import read_file, suffix_of, type_of
from inrank_dist.data.tokens import read_tokens
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


# Tokens -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("plain")
    settings = DataSettings(cache_dir=str(folder / "cache"), validation_fraction=0.2, **save(folder, ".jsonl"))
    return prepare(settings, TokenizerSettings(vocab_size=300), 16, progress=False)


def stream(plain: Prepared, part: str) -> np.ndarray:
    rows = np.array(getattr(plain, part)["input_ids"][:])
    return np.append(rows[:, :-1].ravel(), rows[-1, -1])


def llm_c(tokens: np.ndarray) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


def megatron(tokens: np.ndarray, eos: int, *, with_eos: bool, code: int) -> tuple[bytes, bytes]:
    """The .bin and .idx file of a data set with a sequence for each document, and a document of two sequences."""
    documents = np.split(tokens, np.flatnonzero(tokens == eos) + 1)
    documents = [each if with_eos else each[each != eos] for each in documents if len(each)]
    first, *rest = documents
    sequences = [first[:3], first[3:], *rest]
    dtype = {4: "<i4", 5: "<i8", 8: "<u2"}[code]
    lengths = np.array([len(each) for each in sequences], dtype="<i4")
    pointers = (np.cumsum(lengths) - lengths).astype("<i8") * np.dtype(dtype).itemsize
    starts = np.array([0, *range(2, len(sequences) + 1)], dtype="<i8")
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(starts))
    index += lengths.tobytes() + pointers.tobytes() + starts.tobytes()
    return np.concatenate(sequences).astype(dtype).tobytes(), index


def with_pointers_reversed(index: bytes) -> bytes:
    start, (count,) = 34, struct.unpack("<Q", index[18:26])
    first = start + 4 * count
    pointers = np.frombuffer(index, "<i8", count, first)[::-1]
    return index[:first] + pointers.tobytes() + index[first + 8 * count :]


def npy(header: str) -> bytes:
    """A file with this header and no numbers."""
    text = header.ljust(118).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def token_settings(folder: Path, suffix: str, **settings: Any) -> DataSettings:
    paths = {"paths": [str(folder / f"train*{suffix}")], "validation_paths": [str(folder / f"validation*{suffix}")]}
    return DataSettings(source="tokens", cache_dir=str(folder / "cache"), **paths | settings)


def with_tokenizer(plain: Prepared) -> TokenizerSettings:
    return TokenizerSettings(path=str(plain.folder / "tokenizer.model"), vocab_size=300)


@pytest.mark.parametrize(
    "how", ["npy", "npy int64", "raw", "raw int32", "llm.c", "megatron 4", "megatron 8", "no eos 5"]
)
def test_tokens_that_exist_are_taken_as_they_are(plain: Prepared, tmp_path: Path, how: str) -> None:
    suffix, eos = ".npy" if how.startswith("npy") else ".bin", plain.tokenizer.eos_id
    for part in ("train", "validation"):
        tokens, file = stream(plain, part), tmp_path / f"{part}{suffix}"
        if suffix == ".npy":
            np.save(file, tokens.astype(how.partition(" ")[2] or "uint16"))
        elif how.startswith("raw"):
            half = len(tokens) // 2
            for index, each in enumerate((tokens[:half], tokens[half:])):
                each.astype(how.partition(" ")[2] or "<u2").tofile(tmp_path / f"{part}{index}.bin")
        elif how == "llm.c":
            file.write_bytes(llm_c(tokens))
        else:
            content, index_content = megatron(tokens, eos, with_eos="no eos" not in how, code=int(how[-1]))
            file.write_bytes(content)
            file.with_suffix(".idx").write_bytes(index_content)
    dtype = {"token_dtype": "int32"} if how == "raw int32" else {}
    found = prepare(token_settings(tmp_path, suffix, **dtype), with_tokenizer(plain), 16, progress=False)
    for part in ("train", "validation"):
        assert getattr(found, part)["input_ids"][:] == getattr(plain, part)["input_ids"][:]
    assert found.unigram_entropy == pytest.approx(plain.unigram_entropy, rel=1e-3)
    assert found.fingerprint != plain.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train.bin", np.full(100, 300, "<u2").tobytes(), "holds the token 300, and the tokenizer has 300 tokens"),
        ("train.bin", bytes(101), "has 101 bytes, not a multiple of 2; write the right data.token_dtype"),
        ("train.bin", llm_c(np.zeros(9))[:-2], "has a header of version 1 and 9 tokens, but 1040 bytes"),
        ("train.npy", b"\x80\x04noise", "is not a NumPy array"),
        ("train.npy", pickle.dumps([1, 2]), "is not a NumPy array"),
        ("train.npy", npy("{'descr': '<u2', 'fortran_order': False, 'shape': (10**30,)}"), "is not a NumPy array"),
        ("train.npy", npy("{'descr': '<u2', 'fortran_order': False, 'shape': (True,)}"), "is not a"),
        ("train.npy", npy("{[]: 5}"), "is not a NumPy array"),
        ("train.npy", npy("{'descr': '<u2', 'fortran_order'"), "is not a NumPy array"),
    ],
)
def test_token_files_that_cannot_be_used(plain: Prepared, tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    good = stream(plain, "validation")
    np.save(tmp_path / "validation.npy", good)
    good.astype("<u2").tofile(tmp_path / "validation.bin")
    with pytest.raises(UserError, match=said) as raised:
        prepare(token_settings(tmp_path, Path(name).suffix), with_tokenizer(plain), 16, progress=False)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda bin_, index: (bin_[:-2], index), "train.bin has .* bytes where its index has .* tokens"),
        (lambda bin_, index: (bin_, index[:50]), "train.idx is damaged or of another version"),
        (lambda bin_, index: (bin_, b"x" + index), "train.idx is not an index of Megatron-LM"),
        (lambda bin_, index: (bin_, index[:-8] + struct.pack("<q", 7)), "train.idx is damaged"),
        (lambda bin_, index: (bin_, with_pointers_reversed(index)), "train.idx has its sequences in another order"),
    ],
)
def test_a_damaged_megatron_data_set(plain: Prepared, tmp_path: Path, damage: Any, said: str) -> None:
    parts = megatron(stream(plain, "train"), plain.tokenizer.eos_id, with_eos=True, code=8)
    stream(plain, "validation").astype("<u2").tofile(tmp_path / "validation.bin")
    for suffix, content in zip((".bin", ".idx"), damage(*parts), strict=True):
        (tmp_path / f"train{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=said):
        prepare(token_settings(tmp_path, ".bin"), with_tokenizer(plain), 16, progress=False)


def test_tokens_need_their_tokenizer_and_validation(plain: Prepared, tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", stream(plain, "train"))
    np.save(tmp_path / "validation.npy", stream(plain, "validation"))
    with pytest.raises(UserError, match=r"tokenizer.path is null; write the tokenizer that made them"):
        prepare(token_settings(tmp_path, ".npy"), TokenizerSettings(vocab_size=300), 16, progress=False)
    with pytest.raises(UserError, match=r"data.validation_paths is empty; data.source tokens needs it"):
        token_settings(tmp_path, ".npy", validation_paths=[])
    with pytest.raises(UserError, match=r"both match .*train.npy; write globs without a common file"):
        same = token_settings(tmp_path, ".npy", validation_paths=[str(tmp_path / "*.npy")])
        prepare(same, with_tokenizer(plain), 16, progress=False)


def test_raw_tokens_of_a_large_vocabulary(tmp_path: Path) -> None:
    """Each half of a uint32 would be a token."""
    tokens = np.array([5, 70000, 6, 99999])
    tokens.astype("<u4").tofile(tmp_path / "a.bin")

    def read(dtype: str) -> list[int]:
        found = read_tokens([tmp_path / "a.bin"], dtype=dtype, eos_id=0, vocab_size=100_000, advance=lambda done: None)
        return np.concatenate([*found]).tolist()

    with pytest.raises(
        UserError, match=r"data.token_dtype is uint16, but the tokenizer .* has 100000 tokens; write uint"
    ):
        read("uint16")
    assert read("uint32") == tokens.tolist()
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240801, 7, len(tokens)
    (tmp_path / "a.bin").write_bytes(header.tobytes() + tokens.astype("<u4").tobytes())
    assert read("uint16") == tokens.tolist()
