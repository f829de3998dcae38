"""Speed of preparing text, against the same work written by hand with ``tokenizers`` and ``datasets.map``."""

import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ..data import DataSettings, TokenizerSettings
from ..runtime.errors import UserError
from ..runtime.progress import counted

VOCAB_SIZE = 8192
BLOCK_LENGTH = 1024

#: Size of the validation data, which every route prepares as well.
VALIDATION_BYTES = 100_000

#: Rows that ``datasets.map`` passes to a function at a time, its default.
ROWS = 1000


@dataclass(frozen=True)
class Work:
    """A preparation to measure.

    Attributes:
        text: jsonl file with a document per row.
        validation: another one, of a few documents.
        tokenizer: tokenizer.json, or a SentencePiece model.
        threads: threads of ours, processes of ``datasets.map``.
    """

    text: Path
    validation: Path
    tokenizer: Path
    threads: int


def prepare_ours(work: Work, folder: Path) -> int:
    """Prepare the text with ``prepare``. Returns the number of training tokens, in whole rows."""
    from ..data import prepare

    data = DataSettings(
        source="files",
        paths=[str(work.text)],
        validation_paths=[str(work.validation)],
        cache_dir=str(folder),
        num_workers=work.threads,
    )
    settings = TokenizerSettings(vocab_size=VOCAB_SIZE, path=str(work.tokenizer))
    return prepare(data, settings, BLOCK_LENGTH, progress=False).train_tokens


def prepare_by_hand(work: Work, folder: Path) -> int:
    """Tokenise with ``datasets.map``, append the separator, concatenate and cut into rows, and save.

    As in the examples of ``transformers``, each batch of documents is cut by itself and loses its last row.

    Returns:
        The number of training tokens, in whole rows.
    """
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    tokenizer = Tokenizer.from_file(str(work.tokenizer))
    separator = tokenizer.token_to_id("<|endoftext|>")
    assert separator is not None

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[*each.ids, separator] for each in tokenizer.encode_batch(batch["text"])]}

    def cut(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = [token for ids in batch["input_ids"] for token in ids]
        ends = range(BLOCK_LENGTH, len(joined), BLOCK_LENGTH)
        return {"input_ids": [joined[end - BLOCK_LENGTH : end + 1] for end in ends]}

    rows = 0
    for name, file in (("validation", work.validation), ("train", work.text)):
        text = datasets.load_dataset(
            "json", data_files=str(file), split="train", cache_dir=str(folder / "cache"), num_proc=1
        )
        ids = text.map(
            encode, batched=True, batch_size=ROWS, num_proc=min(work.threads, len(text)), remove_columns=["text"]
        )
        packed = ids.map(cut, batched=True, batch_size=ROWS, num_proc=min(work.threads, len(text)))
        packed.save_to_disk(str(folder / name))
        rows = len(packed)
    return rows * BLOCK_LENGTH


@dataclass
class Route:
    """Measurements of one way to prepare.

    Attributes:
        name: what it is.
        seconds: of each round.
        cpu_seconds: of each round, over all processes.
        tokens: number of training tokens, in whole rows.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    tokens: int = 0


def measure_preparation(texts: Iterator[str], megabytes: int, threads: int, rounds: int) -> tuple[int, list[Route]]:
    """Measure our preparation and the one by hand in alternating rounds, each in a new process.

    Reading, tokenising, packing and writing count; importing and training a tokenizer do not.

    Args:
        texts: documents, of which the first are validation data and the next ``megabytes`` are taken.
        megabytes: size of the text, in 10^6 bytes of UTF-8.
        threads: threads of ours, processes of ``datasets.map``.
        rounds: number of rounds.

    Returns:
        The bytes of text, and the routes: by hand, ours with the same tokenizer, ours with SentencePiece.

    Raises:
        UserError: there is less text than that.
    """
    with tempfile.TemporaryDirectory(prefix="inrank-bench-") as place:
        folder = Path(place)
        size = _write(texts, folder, megabytes)
        fast, sentencepiece = _tokenizers(folder)
        text, validation = folder / "text.jsonl", folder / "validation.jsonl"
        by_hand = Route("tokenizers and datasets.map, by hand")
        same = Route("inrank prepare, the same tokenizer.json")
        ours = Route("inrank prepare, SentencePiece")
        runs: list[tuple[Route, Callable[[Work, Path], int], Path]] = [
            (by_hand, prepare_by_hand, fast),
            (same, prepare_ours, fast),
            (ours, prepare_ours, sentencepiece),
        ]
        every = [each for _ in range(rounds) for each in runs]
        for route, prepare, tokenizer in counted(every, "preparing", unit="runs"):
            work = Work(text, validation, tokenizer, threads)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                seconds, cpu, route.tokens = process.submit(_timed, prepare, work, folder / "out").result()
            route.seconds.append(seconds)
            route.cpu_seconds.append(cpu)
            shutil.rmtree(folder / "out")
    return size, [by_hand, same, ours]


def _timed(prepare: Callable[[Work, Path], int], work: Work, folder: Path) -> tuple[float, float, int]:
    """Seconds, CPU seconds of this process and its children, and what ``prepare`` returns."""
    import datasets  # noqa: F401
    import tokenizers  # noqa: F401

    from ..data import preparation  # noqa: F401

    start, cpu = time.perf_counter(), _cpu_seconds()
    tokens = prepare(work, folder)
    return time.perf_counter() - start, _cpu_seconds() - cpu, tokens


def _cpu_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def _write(texts: Iterator[str], folder: Path, megabytes: int) -> int:
    """Write validation.jsonl with the first documents, and text.jsonl with the others. Returns the bytes of text."""
    size = held_out = 0
    with (folder / "text.jsonl").open("w") as file, (folder / "validation.jsonl").open("w") as validation:
        for text in texts:
            line = json.dumps({"text": text}) + "\n"
            if held_out < VALIDATION_BYTES:
                validation.write(line)
                held_out += len(text.encode())
                continue
            file.write(line)
            size += len(text.encode())
            if size >= megabytes * 1e6:
                return size
    raise UserError(f"the text has {size / 1e6:.1f} MB; write a smaller --megabytes, or --paths with more text")


def _tokenizers(folder: Path) -> tuple[Path, Path]:
    """Train a byte-level BPE tokenizer and a SentencePiece model on the first 4 MB of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from ..data.tokenizer import train_tokenizer

    head, size = [], 0
    with (folder / "text.jsonl").open() as file:
        for line in file:
            head.append(json.loads(line)["text"])
            size += len(head[-1].encode())
            if size > 4_000_000:
                break
    fast, sentencepiece = folder / "tokenizer.json", folder / "tokenizer.model"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(head, trainer)
    tokenizer.save(str(fast))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    train_tokenizer(head, TokenizerSettings(vocab_size=VOCAB_SIZE)).save(sentencepiece)
    return fast, sentencepiece
