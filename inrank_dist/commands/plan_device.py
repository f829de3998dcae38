"""Memory and speed of a device, for ``inrank plan --device``: whether a run fits, and a lower bound on step time."""

import os
import re
from dataclasses import dataclass

from ..engine.cost import Setup
from ..runtime.errors import UserError
from ..runtime.words import plural
from ..train.speed import VENDOR_TFLOPS

USABLE = 0.92
"""Share of a GPU's memory available to a run; the rest is for the CUDA context, libraries, NCCL and fragmentation."""

NODE = 8
"""GPUs per node, as assumed by the plan."""

NETWORK = 50e9
"""Peak bytes per second that a GPU sends to another node: 400 Gbit/s each."""


@dataclass(frozen=True)
class Device:
    """Specifications of a device, from the vendor's data sheet.

    Attributes:
        name: for display.
        memory: bytes.
        usable: share of the memory that can be used.
        bf16, float32: operations per second; None if unknown.
        bandwidth: of the memory, bytes per second.
        link: bytes per second to another device in the same node.
        is_cpu: whether it is this machine's CPU.
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
        """Bytes of memory available to a process."""
        return self.memory * self.usable


GPUS = {
    "h100": Device("H100 80 GB", 80 * 10**9, USABLE, VENDOR_TFLOPS["H100"] * 1e12, 67e12, 3.35e12, 450e9),
    "h200": Device("H200 141 GB", 141 * 10**9, USABLE, VENDOR_TFLOPS["H200"] * 1e12, 67e12, 4.8e12, 450e9),
    "a100": Device("A100 80 GB", 80 * 10**9, USABLE, VENDOR_TFLOPS["A100"] * 1e12, 19.5e12, 2.04e12, 300e9),
}

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def device_named(text: str, world_size: int) -> Device:
    """The device that ``--device`` names: a GPU, ``cpu`` (this machine, shared by all processes), or a memory size.

    Raises:
        UserError: ``text`` is none of these.
    """
    name = text.strip().lower()
    if name in GPUS:
        return GPUS[name]
    if name == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device(f"this machine's memory, of {plural(world_size, 'process')}", total // world_size, is_cpu=True)
    parts = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?) ?([kmg]i?b)?", name, re.ASCII)
    size = float(parts[1]) * UNITS[parts[2] or ""] if parts else 0.0
    if not 1 <= size < 1e16:
        raise UserError(f"--device is {text!r}; write {', '.join(GPUS)}, cpu, or bytes of memory such as 24GiB or 80e9")
    return Device(text, int(size))


@dataclass(frozen=True)
class Work:
    """Work of a process in one optimizer step.

    Attributes:
        flops: floating-point operations, including recomputation.
        moved: bytes to and from memory.
        sent: bytes to other processes.
    """

    flops: float
    moved: float
    sent: float


def moved_bytes(activations: int, parameters: int, trained: int, moments: int, setup: Setup) -> float:
    """Minimum memory traffic of a step in bytes. Each activation is written and read once. In each micro-batch, the
    forward and backward pass read the weights, and gradients are accumulated. The optimizer reads each weight, its
    gradient and its moments, and writes all but the gradient.

    Args:
        activations: of one micro-batch.
        parameters, trained, moments: float32 bytes of the model as one process computes with it, of its trained
            parameters, and of the optimizer state of the whole model.
    """
    passes = setup.accumulation * (2 * activations + 2 * parameters + 2 * trained)
    parts = setup.processes if setup.engine not in ("local", "ddp", "zero0") else 1
    return passes + (3 * trained + 2 * moments) / parts


def bound_seconds(work: Work, device: Device, setup: Setup) -> dict[str, float]:
    """Lower bounds on the step time in seconds, by resource, as far as the device's specifications are known (roofline
    model; Williams et al. 2009)."""
    flops = device.bf16 if setup.bf16 else device.float32
    bound = {}
    if flops is not None:
        bound["arithmetic"] = work.flops / flops
    if device.bandwidth is not None:
        bound["memory"] = work.moved / device.bandwidth
    if device.link is not None and work.sent:
        bound["network"] = work.sent / (device.link if setup.processes <= NODE else NETWORK)
    return bound
