"""Settings of the text to train on and of its tokenizer."""

import dataclasses
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..runtime.errors import UserError, nearest
from ..runtime.resume import OnResume
from ..runtime.setting_types import fits, in_words
from ..runtime.yaml_text import shown

#: The smallest vocabulary accepted: 256 byte pieces, the unknown piece, the separator, and some characters.
MIN_VOCABULARY = 300

MAX_VOCABULARY = 1 << 24

#: Bounds of the weight of a source, within which sums and shares are exact enough.
MIN_WEIGHT, MAX_WEIGHT = 1e-9, 1e9


@dataclass(kw_only=True)
class DataSettings:
    """The text: its source, what is held out for validation, and where the packed tokens are stored."""

    ON_RESUME: ClassVar[OnResume] = OnResume(free=("*",))  # other text has another fingerprint and is refused for that

    source: Literal["stdlib", "files", "hub", "tokens", "mixture"] = "stdlib"
    """stdlib: the source files of the running Python's standard library. files: your own files, see paths.
    hub: a data set of the Hugging Face hub or a local folder with one, also one of save_to_disk, see name.
    tokens: files of tokens that exist already, see paths and token_dtype; needs validation_paths and tokenizer.path.
    mixture: several of these, see sources."""

    sources: list[dict[str, Any]] = field(default_factory=list)
    """Sources of a mixture, such as [{source: stdlib, weight: 1}, {source: files, paths: [a/*.txt], weight: 3}]. Each
    takes the settings of this section besides cache_dir and num_workers. weight is its share of the training sequences
    (1 if omitted), relative to the others. label names it in the log (its number and source if omitted). A source that
    is used up starts again in another order. The validation loss is the weighted mean of those of the sources."""

    paths: list[str] = field(default_factory=list)
    """Training files for source files: paths or globs (** crosses folders) that end in .txt (one document per file, see
    document_separator), .jsonl or .parquet (one document per row); .txt and .jsonl may be compressed (.gz, .zst). An
    existing path is taken literally, whatever characters it contains. Text must be UTF-8 and is kept unchanged,
    including line ends; only a byte-order mark at the start of a file or document is removed. For source tokens: .npy
    (1-D arrays of integers) or .bin: raw tokens, also with the header of llm.c, or a data set of Megatron-LM with its
    .idx file beside it."""

    validation_paths: list[str] = field(default_factory=list)
    """Validation files, in the same form as paths. Empty: whole documents are held out of paths, see
    validation_fraction."""

    name: str | None = None
    """Data set for source hub: its name on the hub, such as Salesforce/wikitext, or a local data set folder. A data set
    from the hub is downloaded once and not checked again while its prepared folder exists."""

    config: str | None = None
    """Configuration of the hub data set, such as wikitext-103-raw-v1."""

    train_split: str = "train"
    """Split of the hub data set to train on; slices such as train[:10%] work."""

    validation_split: str | None = "validation"
    """Split of the hub data set to validate on, never the test split. null: whole documents are held out of
    train_split, see validation_fraction."""

    text_column: str = "text"
    """Column with the text, for .jsonl, .parquet and hub. a.b is the field b of column a."""

    document_separator: str | None = None
    """Text between the documents of a .txt file, such as "<|endoftext|>", which is removed. null: each file is one
    document."""

    token_dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    """Type of the tokens in .bin files that do not say it themselves, for source tokens."""

    join_rows: bool = False
    """Join documents (rows of jsonl, parquet and hub sources) in their order, without a separator between them. For
    data sets with one line per row instead of one document, such as WikiText. Needs separate validation data. Every
    packed row of tokens then begins with the separator, so that the model learns to begin with it."""

    validation_fraction: float = 0.02
    """Share of the text, in bytes, to hold out for validation if the source has no separate validation data. Documents
    are selected by hash, so the choice is the same on every machine."""

    validation_bytes: int | None = None
    """Bytes (UTF-8) of text to hold out for validation, instead of validation_fraction: a validation set whose size
    does not depend on the amount of training text. Separate validation data is truncated to it. A document that is cut
    is not trained on. null: see validation_fraction."""

    max_bytes: int | None = None
    """Maximum bytes (UTF-8) of training text, and of validation text; null for all. Documents are taken in a fixed
    shuffled order and the last one is truncated, so a smaller value uses a subset of a larger value's text."""

    cache_dir: str = "~/.cache/inrank_dist"
    """Folder of prepared data. With several machines, one that all of them share."""

    num_workers: int | None = None
    """Threads for tokenising; null: one per CPU that the process may use. Only one process of a job prepares."""

    def __post_init__(self) -> None:
        for key in ("max_bytes", "validation_bytes", "num_workers"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise UserError(f"data.{key} is {value}; write 1 or more")
        if self.source == "mixture":
            if len(self.mixture) < 2:
                raise UserError(
                    f"data.sources has {len(self.sources)} items; data.source mixture needs two or more; write "
                    "data.sources: [{source: stdlib}, {source: files, paths: [FOLDER/*.txt]}]"
                )
            return
        if self.source == "files" and not self.paths:
            raise UserError("data.paths is empty; data.source files needs it; write data.paths: [FOLDER/**/*.txt]")
        if self.source == "tokens":
            for key, patterns in (("paths", self.paths), ("validation_paths", self.validation_paths)):
                if not patterns:
                    raise UserError(
                        f"data.{key} is empty; data.source tokens needs it; write data.{key}: [FOLDER/*.bin]"
                    )
        if self.source == "hub" and not self.name:
            raise UserError(
                f"data.name is {self.name!r}; data.source hub needs it; write data.name: Salesforce/wikitext"
            )
        if not 0 < self.validation_fraction <= 0.5:
            raise UserError(
                f"data.validation_fraction is {self.validation_fraction}; it is a share of the text"
                "; write a value above 0 and at most 0.5"
            )
        if self.document_separator == "":
            raise UserError("data.document_separator is ''; write the text between two documents, or null")
        if self.source == "hub" and self.validation_split is not None:
            self._check_splits(self.validation_split)
        if self.join_rows and self.source != "stdlib" and not self.has_own_validation:
            key = "validation_paths" if self.source == "files" else "validation_split"
            raise UserError(
                f"data.join_rows is true and data.{key} is empty; rows of one text cannot be held out"
                f" one by one; write data.{key}, or data.join_rows: false"
            )

    @property
    def mixture(self) -> list["SourceShare"]:
        """The sources of a mixture; empty for other sources.

        Raises:
            UserError: a setting in ``sources`` is unknown or invalid.
        """
        if self.source != "mixture":
            return []
        weighted = [self._weighted(number, dict(given)) for number, given in enumerate(self.sources, 1)]
        labels = [label for label, _, _ in weighted]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise UserError(f"data.sources has the label {twice} twice; write different labels")
        total = sum(weight for _, weight, _ in weighted)
        return [SourceShare(label, weight / total, data) for label, weight, data in weighted]

    def _weighted(self, number: int, given: dict[str, Any]) -> tuple[str, float, "DataSettings"]:
        """Return the label, the weight and the settings of a source."""
        place = f"item {number} of data.sources"
        types = typing.get_type_hints(DataSettings) | {"weight": float, "label": str}
        known = [*(setting.name for setting in dataclasses.fields(self)), "weight", "label"]
        known = [key for key in known if key not in SHARED]
        for key, value in given.items():
            if key not in known:
                raise UserError(f"{place} has the unknown setting {key!r}{nearest(key, known)}")
            if not fits(value, types[key]):
                raise UserError(f"{place} has {key} {shown(value)}; write {in_words(types[key])}")
        weight = float(given.pop("weight", 1))
        if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
            raise UserError(
                f"{place} has weight {weight:g}; write a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}, or leave the "
                "source out"
            )
        label = given.pop("label", f"{number}-{given.get('source', 'stdlib')}")
        if not re.fullmatch(r"[A-Za-z0-9_.-][A-Za-z0-9_. -]{0,63}", label):
            raise UserError(
                f"{place} has label {label!r}; write at most 64 letters (a to z), digits, dots, dashes, underscores or "
                "spaces"
            )
        if given.get("source") == "mixture":
            raise UserError(f"{place} is a mixture itself; write its sources one by one")
        try:
            data = DataSettings(**given, cache_dir=self.cache_dir, num_workers=self.num_workers)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        if idle := next((f"{key} has no effect: {why}" for key, why in data.without_effect() if key in given), None):
            raise UserError(f"{place}: {idle}; leave it out")
        return label, weight, data

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Settings that have no effect, with the reasons."""
        source = self.source
        why = f"data.source is {source}"
        if source == "mixture":
            names = [setting.name for setting in dataclasses.fields(self)]
            yield from ((name, why) for name in names if name not in (*SHARED, "source"))
            return
        yield "sources", why
        if self.has_own_validation:
            yield "validation_fraction", f"data.validation_{'split' if source == 'hub' else 'paths'} is set"
        elif self.validation_bytes is not None:
            yield "validation_fraction", "data.validation_bytes is set"
        if source not in ("files", "tokens"):
            yield from ((key, why) for key in ("paths", "validation_paths"))
        if source != "files":
            yield "document_separator", why
        if source != "tokens":
            yield "token_dtype", why
        if source != "hub":
            yield from ((key, why) for key in ("name", "config", "train_split", "validation_split"))
        if source in ("stdlib", "tokens"):
            yield from ((key, why) for key in ("text_column", "join_rows"))
        if source == "tokens":
            yield from ((key, why) for key in ("max_bytes", "validation_bytes", "num_workers"))

    @property
    def has_own_validation(self) -> bool:
        """Whether the source has separate validation data, so that nothing is held out of the training text."""
        if self.source in ("files", "tokens"):
            return bool(self.validation_paths)
        return self.source == "hub" and self.validation_split is not None

    def _check_splits(self, validation: str) -> None:
        names = {part.split("[")[0].strip() for part in validation.split("+")}
        if any(name.lower().startswith("test") for name in names):
            raise UserError(
                f"data.validation_split is {validation!r}; the test split is not for validation; write"
                " data.validation_split: validation, or null to hold out part of data.train_split"
            )
        if validation == self.train_split:
            raise UserError(
                f"data.validation_split is {validation!r}, the same as data.train_split; write another,"
                " or null to hold out part of data.train_split"
            )


#: Settings of a mixture as a whole, not of its sources.
SHARED = ("sources", "cache_dir", "num_workers")


@dataclass(frozen=True)
class SourceShare:
    """A source of a mixture.

    Attributes:
        label: name of the source.
        share: share of the training sequences; those of all sources add up to 1.
        data: the settings of the source.
    """

    label: str
    share: float
    data: DataSettings


@dataclass(kw_only=True)
class TokenizerSettings:
    """The tokenizer: SentencePiece, trained on the training text or loaded."""

    ON_RESUME: ClassVar[OnResume] = OnResume(free=("path",), fixed=("*",))  # another tokenizer has another fingerprint

    kind: Literal["bpe", "unigram"] = "bpe"
    """Training algorithm. unigram takes about 15 times as long as bpe."""

    vocab_size: int = 2048
    """Number of tokens, including 256 byte pieces (so that any text can be encoded) and the document separator."""

    path: str | None = None
    """Tokenizer to load instead of training one: a SentencePiece model file, a tokenizer.json of Hugging Face, a folder
    that holds one, or a .tiktoken file."""

    pattern: Literal["gpt2", "cl100k", "o200k"] | None = None
    """For a .tiktoken file: the encoding of tiktoken whose pattern splits the text. cl100k is also that of Llama 3."""

    eos_token: str | None = None
    """Token that separates documents, in a tokenizer of Hugging Face. null: the eos_token of its configuration. For a
    .tiktoken file: <|endoftext|>, with the id after the last rank."""

    special_tokens_in_text: bool = False
    """Whether special tokens of a tokenizer of Hugging Face that occur in a text are taken for tokens. false: they are
    ordinary text."""

    max_training_bytes: int = 4_000_000
    """Maximum bytes of training text to train the tokenizer on."""

    def __post_init__(self) -> None:
        if self.vocab_size < MIN_VOCABULARY:
            raise UserError(
                f"tokenizer.vocab_size is {self.vocab_size}; byte fallback alone needs 258"
                f"; write a vocab_size of at least {MIN_VOCABULARY}"
            )
        if self.vocab_size > MAX_VOCABULARY:
            raise UserError(
                f"tokenizer.vocab_size is {self.vocab_size}; write a vocab_size of at most {MAX_VOCABULARY}"
            )
        if self.max_training_bytes < 1:
            raise UserError(f"tokenizer.max_training_bytes is {self.max_training_bytes}; write 1 or more")
