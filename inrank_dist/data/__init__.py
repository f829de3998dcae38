"""Text to batches: read, tokenise and pack once; then one order of samples on any number of processes."""

from inrank_dist.data.loader import Loader, LoaderState, MicroBatch, check_batch_sizes, validation_batches
from inrank_dist.data.prepare import Prepared, prepare
from inrank_dist.data.settings import DataSettings, TokenizerSettings
from inrank_dist.data.tokenizer import Tokenizer

__all__ = [
    "DataSettings",
    "Loader",
    "LoaderState",
    "MicroBatch",
    "Prepared",
    "Tokenizer",
    "TokenizerSettings",
    "check_batch_sizes",
    "prepare",
    "validation_batches",
]
