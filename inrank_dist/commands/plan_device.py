"""What a device can hold and do, for ``inrank plan --device``: does a run fit, and how long a step takes at least."""

import os
import re
from dataclasses import dataclass

from ..engine.cost import Setup
from ..runtime.errors import UserError
from ..train.speed import VENDOR_TFLOPS

USABLE = 0.92
"""Share of a GPU's memory that a run can count on; the rest is the context, libraries, NCCL's buffers and holes."""

NODE = 8
"""GPUs of a node, as far as the plan is concerned."""

NETWORK = 50e9
"""Bytes per second that a GPU sends to another node, at best: 400 Gbit/s for each."""


@dataclass(frozen=True)
class Device:
    """Figures of a device, from its vendor's data sheet.

    Attributes:
        name: as it is shown.
        memory: bytes.
        usable: share of it.
        bf16, float32: operations per second; None: not known.
        bandwidth: of its memory, bytes per second.
        link: bytes per second that it sends to another one of its node.
        is_cpu: it is this machine.
    """

    name: str
    memory: int
    usable: float = 1.0
    bf16: float | None = None
    float32: float | None = None
    bandwidth: float | None = None
    link: float | None = None
    is_cpu: bool = False

    @property
    def room(self) -> float:
        """Bytes that a process can use."""
        return self.memory * self.usable


GPUS = {
    "h100": Device("H100 80 GB", 80 * 10**9, USABLE, VENDOR_TFLOPS["H100"] * 1e12, 67e12, 3.35e12, 450e9),
    "h200": Device("H200 141 GB", 141 * 10**9, USABLE, VENDOR_TFLOPS["H200"] * 1e12, 67e12, 4.8e12, 450e9),
    "a100": Device("A100 80 GB", 80 * 10**9, USABLE, VENDOR_TFLOPS["A100"] * 1e12, 19.5e12, 2.04e12, 300e9),
}

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def device_named(text: str, world_size: int) -> Device:
    """The device that ``--device`` names: a GPU, ``cpu`` (this machine, shared by all processes), or bytes of memory.

    Raises:
        UserError: it is none of these.
    """
    word = text.strip().lower()
    if word in GPUS:
        return GPUS[word]
    if word == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device(f"this machine's memory, of {world_size} process(es)", total // world_size, is_cpu=True)
    parts = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?) ?([kmg]i?b)?", word, re.ASCII)
    size = float(parts[1]) * UNITS[parts[2] or ""] if parts else 0.0
    if not 1 <= size < 1e16:
        raise UserError(f"--device is {text!r}; write {', '.join(GPUS)}, cpu, or bytes of memory such as 24GiB or 80e9")
    return Device(text, int(size))


@dataclass(frozen=True)
class Work:
    """What a process does in one optimizer step.

    Attributes:
        flops: operations, with those of recomputation.
        moved: bytes to and from memory.
        sent: bytes to other processes.
    """

    flops: float
    moved: float
    sent: float


def moved_bytes(activations: int, parameters: int, trained: int, moments: int, setup: Setup) -> float:
    """Bytes that a step moves at least: each activation is written and read once; in each micro-batch weights are read
    by the forward and the backward pass and gradients added to; the optimizer reads a weight, its gradient and its
    moments and writes all but the gradient.

    Args:
        activations: of one micro-batch.
        parameters, trained, moments: float32 bytes of the model, as one process computes with it, and of what the
            optimizer remembers of all of it.
    """
    passes = setup.accumulation * (2 * activations + 2 * parameters + 2 * trained)
    parts = setup.processes if setup.kind not in ("local", "ddp", "zero0") else 1
    return passes + (3 * trained + 2 * moments) / parts


def bound_seconds(work: Work, device: Device, setup: Setup) -> dict[str, float]:
    """Seconds that a step takes at least for each of the three, where the device's figures are known (Williams et al.
    2009, "Roofline")."""
    flops = device.bf16 if setup.bf16 else device.float32
    bound = {}
    if flops is not None:
        bound["arithmetic"] = work.flops / flops
    if device.bandwidth is not None:
        bound["memory"] = work.moved / device.bandwidth
    if device.link is not None and work.sent:
        bound["network"] = work.sent / (device.link if setup.processes <= NODE else NETWORK)
    return bound
