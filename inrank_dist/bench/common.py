"""Helpers for the tables of several benchmarks."""

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from ..runtime.context import Context

MIB = 2**20


def machine_info(context: Context) -> dict[str, Any]:
    """Device, torch version and number of processes and threads of a measurement."""
    on_gpu = context.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(context.device) if on_gpu else "CPU",
        "torch": torch.__version__,
        "processes": context.world_size,
        "threads": torch.get_num_threads(),
    }


def spread(values: Sequence[float]) -> str:
    """``median (lowest-highest)``."""
    digits = 2 if statistics.median(values) < 10 else 1 if statistics.median(values) < 100 else 0
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
