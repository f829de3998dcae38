"""Memory of a computation, and its trace: the most bytes that it held at once beyond what was there before."""

import ctypes
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")

MALLOPT = {-4: 0, -1: -1, -2: 64 * 2**20}
"""glibc's M_MMAP_MAX: map no piece by itself; M_TRIM_THRESHOLD: never shrink the heap; M_TOP_PAD: grow it by this."""


def keep_freed_memory(device: torch.device) -> None:
    """On CPU, have glibc keep what is freed for the next step instead of giving it back to the system.

    A step allocates and frees gigabytes in large pieces, each of which glibc would map anew, and the kernel fill with
    zeros page by page: a tenth of the step of GPT-2 small on two cores (README). Nothing is done where an environment
    variable ``MALLOC_...`` shows that the user has ideas of their own, or without glibc.
    """
    if device.type != "cpu" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for parameter, value in MALLOPT.items():
        mallopt(parameter, value)


def peak_resident_bytes() -> int:
    """The most memory of the machine that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_extra_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Peak of bytes allocated through PyTorch's allocator while ``work`` runs, its result included.

    That counts the tensors and the copies and workspaces that PyTorch hands to LAPACK or cuSOLVER, on ``device`` alone;
    it does not count what the libraries allocate by themselves. Too slow to be timed.

    Args:
        work: should have run once before, so that caches are filled.
        device: where to count.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        with cuda_peak(device) as peak:
            work()
        return peak() - before
    result, profiler = profiled(work, device)
    del result  # only now: what is freed is no longer in use
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return peak_in(trace)


def profiled(work: Callable[[], Result], device: torch.device) -> tuple[Result, profile]:
    """Run under torch's profiler, on CPU with every allocation.

    Returns:
        What ``work`` returned, and the profiler, which can export its trace.
    """
    on_cpu = device.type == "cpu"
    activities = [ProfilerActivity.CPU] if on_cpu else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    profiler = profile(activities=activities, profile_memory=on_cpu)
    _quietly(profiler.start)
    try:
        return work(), profiler
    finally:
        _quietly(profiler.stop)


@contextmanager
def cuda_peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """What it yields says, afterwards, how many bytes were allocated on a GPU at most."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield partial(torch.cuda.max_memory_allocated, device)
    torch.cuda.synchronize(device)


def peak_in(trace: Path) -> int:
    """Most bytes that were allocated and not yet freed at any moment of a trace, on CPU."""
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
