"""Settings of the text to train on and of its tokenizer."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..runtime.errors import UserError
from ..runtime.resume import OnResume

#: The smallest vocabulary accepted: 256 byte pieces, the unknown piece, the separator, and some characters.
MIN_VOCABULARY = 300

MAX_VOCABULARY = 1 << 24


@dataclass(kw_only=True)
class DataSettings:
    """The text: its source, what is held out for validation, and where the packed tokens are stored."""

    ON_RESUME: ClassVar[OnResume] = OnResume(free=("*",))  # other text has another fingerprint and is refused for that

    source: Literal["stdlib", "files", "hub", "tokens"] = "stdlib"
    """stdlib: the source files of the running Python's standard library. files: your own files, see paths.
    hub: a data set of the Hugging Face hub or a local folder with one, also one of save_to_disk, see name.
    tokens: files of tokens that exist already, see paths and token_dtype; needs validation_paths and tokenizer.path."""

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

    max_bytes: int | None = None
    """Maximum bytes (UTF-8) of training text, and of validation text; null for all. Documents are taken in a fixed
    shuffled order and the last one is truncated, so a smaller value uses a subset of a larger value's text."""

    cache_dir: str = "~/.cache/inrank_dist"
    """Folder of prepared data. With several machines, one that all of them share."""

    num_workers: int | None = None
    """Threads for tokenising; null: one per CPU that the process may use. Only one process of a job prepares."""

    def __post_init__(self) -> None:
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
        for key, value, least in (("max_bytes", self.max_bytes, 1), ("num_workers", self.num_workers, 1)):
            if value is not None and value < least:
                raise UserError(f"data.{key} is {value}; write {least} or more")
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


@dataclass(kw_only=True)
class TokenizerSettings:
    """The tokenizer: SentencePiece, trained on the training text or loaded."""

    ON_RESUME: ClassVar[OnResume] = OnResume(free=("path",), fixed=("*",))  # another tokenizer has another fingerprint

    kind: Literal["bpe", "unigram"] = "bpe"
    """Training algorithm. unigram takes about 15 times as long as bpe."""

    vocab_size: int = 2048
    """Number of tokens, including 256 byte pieces (so that any text can be encoded) and the document separator."""

    path: str | None = None
    """Tokenizer to load instead of training one: a SentencePiece model file, a tokenizer.json of Hugging Face, or a
    folder that holds one."""

    eos_token: str | None = None
    """Token that separates documents, in a tokenizer of Hugging Face. null: the eos_token of its configuration."""

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
