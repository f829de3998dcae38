"""Text to batches: read, tokenise and pack once; then one order of samples on any number of processes."""

from typing import TYPE_CHECKING, Any

from .loader import Loader, LoaderState, MicroBatch, check_batch_sizes, validation_batches
from .prefetch import Prefetcher
from .settings import DataSettings, TokenizerSettings
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .preparation import Prepared, find_prepared, prepare

__all__ = [
    "DataSettings",
    "Loader",
    "LoaderState",
    "MicroBatch",
    "Prefetcher",
    "Prepared",
    "Tokenizer",
    "TokenizerSettings",
    "check_batch_sizes",
    "find_prepared",
    "prepare",
    "validation_batches",
]


def __getattr__(name: str) -> Any:
    """What reads and packs text, when it is first asked for: ``datasets`` takes seconds to import."""
    if name in ("Prepared", "find_prepared", "prepare"):
        from . import preparation

        return getattr(preparation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
