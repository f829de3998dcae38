"""Import of DeepSpeed, and its configuration derived from ours."""

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
"""Maximum number of elements in a gradient bucket. ``parallel.deepspeed`` can override it."""


def load_deepspeed() -> Any:
    """Import and return the package ``deepspeed``. It is imported on demand, because that takes seconds."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    use_own_builds()
    import deepspeed
    import deepspeed.ops

    # On CPUs, DeepSpeed would compile a shared-memory all-reduce that only its inference uses. That is slow, needs a
    # compiler, and waits forever for the lock of a killed build.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed uses names that newer versions of torch deprecate.
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
    """Return the configuration dictionary for ``deepspeed.initialize``.

    Args:
        stage: stage of ZeRO.
        offload: keep master weights and moments in CPU memory.
        bf16: compute in bfloat16.
        micro_batch_size: sequences in a micro-batch.
        accumulation: micro-batches per step and process.
        extra: ``parallel.deepspeed``, accepted by ``zero_settings.check``.

    Raises:
        UserError: if DeepSpeed rejects a name or value in ``extra``.
    """
    ours = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # clipped in ``zero._Gate``
        "steps_per_print": sys.maxsize,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu" if offload else "none"}},
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
    }
    # Communicate in float32 by default.
    config = merge(merge({"torch_autocast": {"lower_precision_safe_modules": []}}, extra or {}), ours)
    deepspeed = load_deepspeed()
    with explained(bool(extra)):
        deepspeed.DeepSpeedConfig(config)
    return config


@contextmanager
def explained(passed_on: bool) -> Iterator[None]:
    """Context manager that converts exceptions of DeepSpeed to a ``UserError`` of one line.

    Args:
        passed_on: whether the configuration includes settings of the user. If not, exceptions are not converted.
    """
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
