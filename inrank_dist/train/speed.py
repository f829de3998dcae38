"""Peak floating-point performance of devices, for model FLOPs utilization (MFU)."""

import re
import time
from functools import cache
from typing import NamedTuple

import torch

VENDOR_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A40": 149.7,
    "A10": 125.0,
}
"""Peak dense bf16 tensor-core TFLOPS from vendor data sheets, by part of the device name. Longer names come first."""


class Peak(NamedTuple):
    """Peak floating-point operations per second of a device, and the source of the figure."""

    flops: float
    source: str


def known_peak(device: torch.device, *, bf16: bool, tflops: float | None = None) -> Peak | None:
    """Return the peak that the MFU of a run refers to.

    On CPU it is None unless ``train.peak_tflops`` is set, because a measurement depends too much on the current load of
    the machine.

    Args:
        device: device of the process.
        bf16: whether the run computes in bfloat16.
        tflops: value of ``train.peak_tflops``, which takes precedence.
    """
    if tflops is not None:
        return Peak(tflops * 1e12, "train.peak_tflops")
    return None if device.type == "cpu" else peak_of(device, bf16=bf16)


def peak_of(device: torch.device, *, bf16: bool) -> Peak:
    """Return the vendor's peak of a device if known, otherwise the measured speed of a large matrix product."""
    if device.type == "cuda" and bf16:
        name = torch.cuda.get_device_name(device)
        for key, known in VENDOR_TFLOPS.items():
            if re.search(rf"\b{key}\b", name) and "MIG" not in name:  # a slice of a GPU has no vendor figure
                return Peak(known * 1e12, f"vendor's figure for {key}")
    return _measured(device, torch.bfloat16 if bf16 else torch.float32)


@cache
def _measured(device: torch.device, dtype: torch.dtype) -> Peak:
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return Peak(2 * size**3 / best, f"measured, a product of {size} x {size} matrices in {str(dtype)[6:]}")
