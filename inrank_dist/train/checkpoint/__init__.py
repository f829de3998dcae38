"""Checkpoints in safetensors and JSON, the same for every engine and number of processes. No pickle.

``listing`` finds checkpoint folders, ``folder`` defines when one is complete, ``state`` and ``tensors`` its content,
``contents`` checks that the content is consistent, ``writer`` writes, and ``reading`` selects a checkpoint.
"""

from .contents import Checkpoint, Finding, examine, mismatch
from .folder import list_checkpoints
from .listing import Damaged, Unreadable, check_run_folder, folder_of, named_folders, step_of
from .reading import branch_point, find_checkpoint, open_checkpoint, peek_checkpoint, resumable
from .state import TrainState
from .tensors import TensorReader, load_parameters, load_tensors, stored_tensors
from .writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "Damaged",
    "Finding",
    "TensorReader",
    "TrainState",
    "Unreadable",
    "branch_point",
    "check_run_folder",
    "examine",
    "find_checkpoint",
    "folder_of",
    "list_checkpoints",
    "load_parameters",
    "load_tensors",
    "mismatch",
    "named_folders",
    "open_checkpoint",
    "peek_checkpoint",
    "resumable",
    "step_of",
    "stored_tensors",
]
