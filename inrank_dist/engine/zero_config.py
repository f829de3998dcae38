"""DeepSpeed's settings from ours."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..runtime.errors import UserError
from .kernels import use_own_builds
from .zero_settings import merge

MOST_IN_A_BUCKET = 50_000_000
"""Elements of a bucket of gradients, unless ``parallel.deepspeed`` says otherwise."""


def load_deepspeed() -> Any:
    """The package ``deepspeed``; imported late, because it takes seconds."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    use_own_builds()
    import deepspeed
    import deepspeed.ops

    # For processes on CPUs DeepSpeed would compile an all-reduce in shared memory, which takes a minute and a compiler
    # and waits without end for the lock of a build that was killed. Only its inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its calls, which the newest torch has other names for.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)
    return deepspeed


def deepspeed_config(
    stage: int,
    *,
    offload: bool,
    bf16: bool,
    micro_batch_size: int,
    accumulation: int,
    extra: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """DeepSpeed's settings from ours.

    Args:
        stage: of ZeRO.
        offload: keep master weights and moments in the memory of the CPU.
        bf16: compute in bfloat16.
        micro_batch_size, accumulation: sequences of a micro-batch, and micro-batches of a step in one process.
        extra: ``parallel.deepspeed``, which ``zero_settings.check`` has passed.

    Raises:
        UserError: a name or value in ``extra`` that DeepSpeed does not know.
    """
    ours = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # the client optimizer clips, as with every engine
        "steps_per_print": sys.maxsize,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu" if offload else "none"}},
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
    }
    # Everything travels in float32 unless asked for.
    config = merge(merge({"torch_autocast": {"lower_precision_safe_modules": []}}, extra or {}), ours)
    deepspeed = load_deepspeed()
    with explained(bool(extra)):
        deepspeed.DeepSpeedConfig(config)
    return config


@contextmanager
def explained(passed_on: bool) -> Iterator[None]:
    """Where settings of the user's were passed on, what DeepSpeed raises is about them: tell it in one line."""
    try:
        yield
    except (ValueError, AssertionError, TypeError, AttributeError, KeyError) as error:
        if not passed_on:
            raise
        told = " ".join(line.strip() for line in str(error).splitlines() if "errors.pydantic.dev" not in line)
        raise UserError(
            f"parallel.deepspeed is refused by DeepSpeed: {told or type(error).__name__}; write what its documentation "
            "names, or leave it out"
        ) from error
