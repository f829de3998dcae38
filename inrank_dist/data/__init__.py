"""The data pipeline: read, tokenise and pack text once; then load samples in an order independent of the world size."""

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
    """Import what reads and packs text on first use, because ``datasets`` takes seconds to import."""
    if name in ("Prepared", "find_prepared", "prepare"):
        from . import preparation

        return getattr(preparation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
