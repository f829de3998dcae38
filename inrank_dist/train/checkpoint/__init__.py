"""Checkpoints: plain safetensors and JSON, the same for every engine and any number of processes. No pickle anywhere.

``listing`` says which ones there are, ``folder`` what makes one whole, ``state`` and ``tensors`` what is in it,
``contents`` whether that fits together, ``writer`` how it is written, ``reading`` which one a reader gets.
"""

from .contents import Checkpoint, Finding, examine, misfit
from .folder import list_checkpoints
from .listing import Damaged, Unreadable, check_run_folder, folder_of, named_folders, step_of
from .reading import branch_point, find_checkpoint, open_checkpoint, peek_checkpoint, resumable
from .state import TrainState
from .tensors import load_parameters, load_tensors, stored_tensors
from .writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "Damaged",
    "Finding",
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
    "misfit",
    "named_folders",
    "open_checkpoint",
    "peek_checkpoint",
    "resumable",
    "step_of",
    "stored_tensors",
]
