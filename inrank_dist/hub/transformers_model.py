"""Exports a checkpoint as a model folder of ``transformers``."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..lowrank.kinds import kind_of
from ..models import ModelSettings
from ..models.huggingface import PREFIX, build
from ..models.huggingface_config import dtype_key
from .architectures import module_names, transformers_config
from .writer import Planned, write_tensors


def write_transformers(
    folder: Path,
    settings: ModelSettings,
    vocab_size: int,
    eos_id: int,
    weights: Callable[[str], Tensor],
    buffers: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Write configuration, generation configuration and weights. At most one layer is in memory at a time.

    Args:
        folder: an existing, empty folder.
        eos_id: id of the token that separates documents.
        weights: parameter name -> parameter of our dense model.
        buffers: buffer name -> buffer of our dense model.
        dtype: floating dtype of the weights. Each weight is rounded once.
        max_shard_bytes: size of a weight file above which a new one is started.

    Raises:
        UserError: the model has no counterpart in ``transformers``.
    """
    target = build_target(settings, vocab_size)
    config = target.config
    config.architectures = [type(target).__name__]
    config.use_cache = True
    config.bos_token_id = config.eos_token_id = eos_id
    setattr(config, dtype_key(config), dtype)
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=eos_id, eos_token_id=eos_id, pad_token_id=eos_id).save_pretrained(folder)
    planned = [
        Planned(name, tuple(parameter.shape), dtype, partial(_value, target, settings, name, weights))
        for name, parameter in target.named_parameters()
    ]
    parameters = {name for name, _ in target.named_parameters(remove_duplicate=False)}
    planned += [
        Planned(name, tuple(tensor.shape), tensor.dtype, partial(buffers, PREFIX + name))
        for name, tensor in target.state_dict().items()
        if name not in parameters
    ]
    write_tensors(folder, planned, max_shard_bytes)


def build_target(settings: ModelSettings, vocab_size: int) -> Any:
    """Build the model of ``transformers`` that corresponds to ours, on ``meta``.

    Raises:
        UserError: the model has no counterpart in ``transformers``.
    """
    with torch.device("meta"):
        return build(transformers_config(settings, vocab_size), vocab_size)


def _value(target: nn.Module, settings: ModelSettings, name: str, weights: Callable[[str], Tensor]) -> Tensor:
    """Return a parameter of the model of ``transformers``, given those of ours."""
    path, _, leaf = name.rpartition(".")
    parts = [weights(f"{module}.{leaf}") for module in module_names(settings, path)]
    value = torch.cat(parts) if len(parts) > 1 else parts[0]
    module = target.get_submodule(path)
    kind = kind_of(module)
    return kind.restore(module, value) if kind is not None and leaf == "weight" else value
