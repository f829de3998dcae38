"""Random state of a training step, which dropout uses."""

import torch

from ..lowrank.init import seed_for


def seed_step(seed: int, step: int, process_rank: int, device: torch.device) -> None:
    """Seed the default generators of PyTorch for one optimizer step.

    The random numbers depend only on the arguments, so a resumed run needs no saved random state. The default
    generators are used because activation checkpointing, compiled graphs and CUDA graphs save and replay their state.

    The result is the same as that of ``torch.manual_seed``, which is slower: it also seeds all other backends, and
    formats a stack trace for each one that is not initialised.

    Args:
        seed: seed of the run.
        step: number of completed optimizer steps.
        process_rank: global rank of this process.
        device: device that this process uses.
    """
    value = seed_for(seed, "step", step, process_rank)
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.init()  # creates the generators
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(value)
