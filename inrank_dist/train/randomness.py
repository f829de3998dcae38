"""The random state of a step, which dropout draws from."""

import torch

from ..lowrank.init import seed_for


def seed_step(seed: int, step: int, process_rank: int, device: torch.device) -> None:
    """Seed torch's default generators of this process for one optimizer step.

    What is drawn depends on the arguments alone, so a resumed run needs no saved random state. The default generators
    are what activation checkpointing, compiled graphs and CUDA graphs save and replay.

    The same draws as after ``torch.manual_seed``, which also visits every other backend, and where a backend is not
    initialised formats a stack trace (some ten ``stat`` calls) to say later who asked.

    Args:
        seed: of the run.
        step: completed optimizer steps.
        process_rank: global rank of this process.
        device: the device it computes on.
    """
    value = seed_for(seed, "step", step, process_rank)
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.init()  # the generators exist from then on
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(value)
