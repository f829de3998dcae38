"""Measurement of peak memory, and allocator settings for training on CPU."""

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

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")

MALLOPT = {-4: 0, -1: -1, -2: 64 * 2**20}
"""Options of glibc's ``mallopt``.

``M_MMAP_MAX`` 0 never maps an allocation separately. ``M_TRIM_THRESHOLD`` -1 never shrinks the heap. ``M_TOP_PAD`` is
the number of additional bytes to request when the heap grows.
"""


def keep_freed_memory(device: torch.device) -> None:
    """Make glibc keep freed memory for the next step when training on CPU.

    By default glibc maps every large allocation anew, and the kernel fills its pages with zeros. A training step makes
    many such allocations. Does nothing without glibc, or if the user has set a ``MALLOC_...`` environment variable.
    """
    if device.type != "cpu" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for parameter, value in MALLOPT.items():
        mallopt(parameter, value)


def peak_resident_bytes() -> int:
    """Return the peak resident set size of this process in bytes.

    Linux carries ``ru_maxrss`` over from the process that started this one, so it is only used elsewhere.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_bytes() -> int:
    """Return the resident set size of this process in bytes."""
    return psutil.Process().memory_info().rss


def peak_extra_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Return the peak of additional bytes that PyTorch allocates on ``device`` while ``work`` runs.

    The result of ``work`` is included, and so are the copies and workspaces that PyTorch passes to LAPACK and cuSOLVER.
    Memory that these libraries allocate themselves is not counted. ``work`` runs much slower than usual on CPU, because
    it is profiled.

    Args:
        work: function to measure. It should have run before, so that caches are filled.
        device: device whose allocations are counted.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        with cuda_peak(device) as peak:
            work()
        return peak() - before
    result, profiler = profiled(work, device)
    del result  # not earlier, so that the result counts as allocated memory
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return peak_in(trace)


def profiled(work: Callable[[], Result], device: torch.device) -> tuple[Result, profile]:
    """Run ``work`` under the PyTorch profiler. On CPU the profiler records every allocation.

    Returns:
        The result of ``work``, and the profiler, which can export a trace.
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
    """Yield a function that returns the peak of allocated bytes on a GPU. Call it after the context."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield partial(torch.cuda.max_memory_allocated, device)
    torch.cuda.synchronize(device)


def peak_in(trace: Path) -> int:
    """Return the peak of allocated bytes in a trace recorded on CPU."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    sizes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    held, peak = 0, 0
    for _, size in sorted(sizes, key=lambda each: each[0]):  # stable, so simultaneous events keep their order
        held += size
        peak = max(peak, held)
    return peak


def _quietly(call: Callable[[], object]) -> None:
    """Call a function with stderr redirected, which hides messages of the profiler's C++ code."""
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
