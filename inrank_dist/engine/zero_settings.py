"""Validation of ``parallel.deepspeed``, further settings for DeepSpeed. It does not import DeepSpeed."""

import difflib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from ..runtime.errors import UserError, install

OURS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "amp": "train.precision",
    "torch_autocast.enabled": "train.precision",
    "torch_autocast.dtype": "train.precision",
    "zero_optimization.stage": "parallel.engine",
    "zero_optimization.offload_optimizer.device": "parallel.offload_optimizer",
    "activation_checkpointing": "train.activation_checkpointing",
    "compile": "train.compile",
    "checkpoint": "checkpoint.*",
    "steps_per_print": "log.interval",
}
"""Options of DeepSpeed that our settings determine, with the name of our setting."""

KNOWN = (
    "zero_optimization",
    "torch_autocast",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
)
"""Options that are passed to DeepSpeed. It silently ignores unknown names, so all others are rejected."""

AUTOCAST = ("lower_precision_safe_modules",)
"""Options in ``torch_autocast`` that are passed to DeepSpeed. All others are rejected."""

UNSUPPORTED = (
    "zero_optimization.offload_param",
    "zero_optimization.cpu_offload",
    "zero_optimization.cpu_offload_param",
    "zero_optimization.cpu_offload_use_pin_memory",
    "zero_optimization.offload_optimizer.nvme_path",
    "zero_optimization.offload_optimizer.ratio",
    "zero_optimization.offload_optimizer.super_offload",
    "zero_optimization.legacy_stage1",
    "zero_optimization.leaf_module",
    "zero_optimization.round_robin_gradients",
    "zero_optimization.stage3_module_granularity_threshold",
    "zero_optimization.zero_hpz_partition_size",
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_gradients",
    "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.mics_shard_size",
    "zero_optimization.zenflow",
)
"""Options that rank events and checkpoints do not support, because they move, partition or quantise tensors, or fail if
the model changes."""

SECTIONS = ("zero_optimization", "zero_optimization.offload_optimizer", "torch_autocast")
"""Sections with nested options, some of which our settings determine."""


def require_deepspeed(engine: str) -> None:
    """Check that DeepSpeed is installed, without importing it.

    Raises:
        UserError: if it is not.
    """
    if find_spec("deepspeed") is None:
        raise UserError(
            f"parallel.engine is {engine}, which needs DeepSpeed; {install('deepspeed')}, or parallel.engine: fsdp"
        )


def check(extra: Mapping[str, Any]) -> None:
    """Check ``parallel.deepspeed``.

    Raises:
        UserError: if an option is determined by another setting, unsupported, unknown, or has a value where a section
            is expected.
    """
    for name, value in _entries(extra):
        if name in OURS:
            raise UserError(f"parallel.deepspeed sets {name}, which {OURS[name]} decides; write {OURS[name]} instead")
        if name in UNSUPPORTED:
            raise UserError(f"parallel.deepspeed sets {name}, which is not supported with rank events; leave it out")
        if name in SECTIONS and not isinstance(value, Mapping):
            raise UserError(f"parallel.deepspeed sets {name} to {value!r}; write keys and values such as {{a: 1}}")
        section, _, key = name.rpartition(".")
        known = KNOWN if not section else AUTOCAST if section == "torch_autocast" else (key,)
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"parallel.deepspeed sets {name}, which is not passed on; {hint}")


def _entries(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each entry in nested mappings, including the inner mappings."""
    for key, value in tree.items():
        if "." in str(key):
            raise UserError(f"parallel.deepspeed sets {path}{key}; write {str(key).replace('.', ': {')}: ... in braces")
        yield f"{path}{key}", value
        if isinstance(value, Mapping):
            yield from _entries(value, f"{path}{key}.")


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings. If both have a value, the one in ``over`` takes precedence."""
    merged = dict(under)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged
