"""Text to a folder of packed tokens, made once and mapped into memory by every process."""

import hashlib
import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, load_from_disk

from inrank_dist.data.corpus import Source, open_source
from inrank_dist.data.documents import Corpus, choose_documents
from inrank_dist.data.hashing import Hashed, hash_files
from inrank_dist.data.packing import pack, tokenise, unigram_entropy
from inrank_dist.data.progress import phase, quiet_datasets
from inrank_dist.data.settings import DataSettings, TokenizerSettings
from inrank_dist.data.store import make_once
from inrank_dist.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from inrank_dist.errors import UserError

logger = logging.getLogger("inrank_dist")

#: Raised whenever the same settings and text would be prepared differently; older folders are then left
#: alone.
FORMAT_VERSION = 2

SCRATCH, SUMMARY, TOKENIZER = "scratch", "prepared.json", "tokenizer.model"


@dataclass(frozen=True)
class Prepared:
    """Packed tokens, ready for a ``Loader``.

    Rows of ``train`` and ``validation`` hold ``input_ids``, ``block_length + 1`` tokens; the last token of a
    row is the first of the next, so each row has ``block_length`` tokens to predict and none is predicted
    twice or skipped, but for fewer than ``block_length`` at the end. ``train_tokens`` and
    ``validation_tokens`` count the tokens to predict. ``fingerprint`` (sha256, hex) is over the text, the
    tokenizer, and the block length.

    ``unigram_entropy`` (nats per token) is the cross-entropy of the validation tokens under the frequencies
    of the training tokens, one added to each count: the loss of a model that knows how frequent each token is
    and nothing of context. A model that learns anything goes below it.
    """

    folder: Path
    train: Dataset
    validation: Dataset
    tokenizer: Tokenizer
    fingerprint: str
    block_length: int
    train_tokens: int
    validation_tokens: int
    unigram_entropy: float


def prepare(data: DataSettings, tokenizer: TokenizerSettings, block_length: int, *, progress: bool = True) -> Prepared:
    """Tokenise and pack the text that ``data`` names, unless that was done, and map the result into memory.

    The folder's name is a hash of the text and of every setting that changes the result. So an edited file or
    a new setting prepares anew, and any number of processes and jobs may call this at the same time: one
    prepares, the others wait (``store.make_once``). Text is hashed at every start; files of 16 MB or more
    only when their inode, size or times changed. Text on the hub is taken as unchanged while its folder
    exists.

    Args:
        block_length: tokens to predict in a row, the model's context length.
        progress: whether this process shows what it does (one process of a job should).

    Raises:
        UserError: a setting, file or folder cannot be used; nothing is left but the lock and the reason.
    """
    loaded = None if tokenizer.path is None else load_tokenizer(tokenizer)
    with quiet_datasets():
        source = open_source(data)
        key = _key(source, data, loaded.fingerprint if loaded else tokenizer, block_length)
        folder = Path(data.cache_dir).expanduser().absolute() / f"{data.source}-{key[:16]}"

        def build(work: Path) -> None:
            scratch = work / SCRATCH
            scratch.mkdir()
            with phase(f"loading the text, data.source {data.source}", None, enabled=progress):
                documents = source.read(scratch)
            corpus = choose_documents(documents, data, progress=progress)
            chosen = loaded or _train(corpus, tokenizer, progress)
            _write(work, corpus, chosen, data, block_length, progress=progress)

        make_once(folder, build)
        return _open_prepared(folder)


def _key(source: Source, data: DataSettings, tokenizer: str | TokenizerSettings, block_length: int) -> str:
    what = {
        "format": FORMAT_VERSION,
        "source": data.source,
        "identity": source.identity,
        "join_rows": data.join_rows,
        "validation_fraction": None if data.has_own_validation else data.validation_fraction,
        "max_bytes": data.max_bytes,
        "tokenizer": tokenizer if isinstance(tokenizer, str) else asdict(tokenizer),
        "block_length": block_length,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _train(corpus: Corpus, settings: TokenizerSettings, progress: bool) -> Tokenizer:
    texts = (row["text"] for row in corpus.train)
    title = f"training a {settings.kind} tokenizer of {settings.vocab_size} tokens"
    with phase(title, None, enabled=progress):
        return train_tokenizer(texts, settings)


def _write(
    work: Path, corpus: Corpus, tokenizer: Tokenizer, data: DataSettings, block_length: int, *, progress: bool
) -> None:
    """Fill ``work``: train/, validation/, tokenizer.model; and prepared.json, with a hash of each file."""
    counts, tokens = {}, {}
    for name, texts in (("train", corpus.train), ("validation", corpus.validation)):
        with phase(f"tokenising {name}", len(texts), enabled=progress) as advance:
            tokenised = tokenise(
                texts,
                tokenizer,
                work / SCRATCH / f"{name}-tokens.arrow",
                separate=not data.join_rows,
                num_workers=min(data.num_workers, len(texts)),
                advance=advance,
            )
        with phase(f"packing {name}", None, enabled=progress):
            rows, counts[name] = pack(tokenised, block_length, work / SCRATCH / f"{name}-rows.arrow")
            if not len(rows):
                raise UserError(
                    f"the {name} text has {counts[name].sum()} tokens and a row takes {block_length + 1}"
                    " (model.max_seq_len + 1) - give more text or write a smaller model.max_seq_len"
                )
            rows.save_to_disk(str(work / name))
        tokens[name] = len(rows) * block_length
    tokenizer.save(work / TOKENIZER)
    shutil.rmtree(work / SCRATCH)
    fingerprint = f"{FORMAT_VERSION} {corpus.digest} {tokenizer.fingerprint} {block_length}"
    summary = {
        "format": FORMAT_VERSION,
        "fingerprint": hashlib.sha256(fingerprint.encode()).hexdigest(),
        "block_length": block_length,
        "train_tokens": tokens["train"],
        "validation_tokens": tokens["validation"],
        "unigram_entropy": unigram_entropy(counts["train"], counts["validation"], tokenizer.vocab_size),
        "train_bytes": corpus.train_bytes,
        "validation_bytes": corpus.validation_bytes,
        "tokenizer": tokenizer.fingerprint,
        "files": {str(path.relative_to(work)): hashed.sha256 for path, hashed in _hash_folder(work).items()},
    }
    (work / SUMMARY).write_text(json.dumps(summary, indent=1))


def _hash_folder(folder: Path) -> dict[Path, Hashed]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hash_files(files, folder.parent)


def _open_prepared(folder: Path) -> Prepared:
    advice = "delete this folder and it is prepared again"
    try:
        summary = json.loads((folder / SUMMARY).read_text())
        hashes = {str(path.relative_to(folder)): hashed.sha256 for path, hashed in _hash_folder(folder).items()}
        for name, sha256 in summary["files"].items():
            if hashes.get(name) != sha256:
                raise UserError(f"{folder / name} is not as it was written - {advice}")
        return Prepared(
            folder=folder,
            train=load_from_disk(str(folder / "train")),
            validation=load_from_disk(str(folder / "validation")),
            tokenizer=Tokenizer.load(folder / TOKENIZER),
            fingerprint=summary["fingerprint"],
            block_length=summary["block_length"],
            train_tokens=summary["train_tokens"],
            validation_tokens=summary["validation_tokens"],
            unigram_entropy=summary["unigram_entropy"],
        )
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder} is damaged ({' '.join(str(error).split())}) - {advice}") from error
