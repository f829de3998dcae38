"""Extra memory of a computation: the most bytes that it held at once beyond what was there before."""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Peak of bytes allocated through PyTorch's allocator while ``work`` runs, its result included.

    That counts the tensors and the copies and workspaces that PyTorch hands to LAPACK or cuSOLVER, on ``device`` alone;
    it does not count what the libraries allocate by themselves. Too slow to be timed.

    Args:
        work: should have run once before, so that caches are filled.
        device: where to count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    _quietly(profiler.start)
    result = work()
    _quietly(profiler.stop)
    del result  # only now: what is freed is no longer in use
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    sizes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    held, peak = 0, 0
    for _, size in sorted(sizes, key=lambda each: each[0]):  # stable: events of one moment keep their order
        held += size
        peak = max(peak, held)
    return peak


def _quietly(call: Callable[[], object]) -> None:
    """Call without what the profiler's C++ writes about itself to stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        call()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
