"""How fast a device can be, and what share of that a run makes use of."""

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
"""Dense bf16 tensor-core peak from the vendors' data sheets, by words in the device's name; the longer name first."""


class Peak(NamedTuple):
    """The most floating-point operations per second of one device, and where the figure is from."""

    flops: float
    source: str


def known_peak(device: torch.device, *, bf16: bool, tflops: float | None = None) -> Peak | None:
    """The peak that the MFU of a run is counted against.

    None on CPU unless ``train.peak_tflops`` is given: what is measured there before a run depends fourfold on what else
    the machine does at that moment, and stands in every line of the log from then on.

    Args:
        bf16: whether the run computes in bfloat16.
        tflops: ``train.peak_tflops``, which goes before all else.
    """
    if tflops is not None:
        return Peak(tflops * 1e12, "train.peak_tflops")
    return None if device.type == "cpu" else peak_of(device, bf16=bf16)


def peak_of(device: torch.device, *, bf16: bool) -> Peak:
    """The peak of a device: the vendor's figure where there is one, else measured now."""
    if device.type == "cuda" and bf16:
        name = torch.cuda.get_device_name(device)
        for key, known in VENDOR_TFLOPS.items():
            if re.search(rf"\b{key}\b", name) and "MIG" not in name:  # a part of a GPU is measured
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
