"""Exports a checkpoint as a model folder of ``transformers``."""

import shutil
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
from ..models.huggingface_config import LAYER_CROSSING, dtype_key
from .architectures import module_names, transformers_config
from .writer import Planned, edit_json, write_tensors

LAYER_CROSSING_CODE = Path(__file__).with_name("modeling_layer_crossing.py")
"""Classes of models with layer crossing, which ``transformers`` does not have."""

CLASSES = {"gpt2": "GPT2LayerCrossing", "llama": "LlamaLayerCrossing"}
"""``model_type`` -> start of the names of its classes in ``LAYER_CROSSING_CODE``."""


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
) -> str | None:
    """Write configuration, generation configuration and weights. At most one layer is in memory at a time.

    Args:
        folder: an existing, empty folder.
        eos_id: id of the token that separates documents.
        weights: parameter name -> parameter of our dense model.
        buffers: buffer name -> buffer of our dense model.
        dtype: floating dtype of the weights. Each weight is rounded once.
        max_shard_bytes: size of a weight file above which a new one is started.

    Returns:
        The file with the code of the model, or None if ``transformers`` has its class.
    """
    target = build_target(settings, vocab_size)
    config = target.config
    config.architectures = [type(target).__name__]
    config.use_cache = True
    config.bos_token_id = config.eos_token_id = eos_id
    setattr(config, dtype_key(config), dtype)
    config.save_pretrained(folder)
    rope = getattr(config, "rope_parameters", None) or {}
    changes: dict[str, Any] = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}  # before version 5
    if settings.layer_crossing:
        shutil.copy(LAYER_CROSSING_CODE, folder)
        changes |= _layer_crossing(config.model_type)
    edit_json(folder / "config.json", changes)
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
    return LAYER_CROSSING_CODE.name if settings.layer_crossing else None


def build_target(settings: ModelSettings, vocab_size: int) -> Any:
    """Build the model of ``transformers`` that corresponds to ours, on ``meta``, without layer crossing."""
    with torch.device("meta"):
        return build(transformers_config(settings, vocab_size), vocab_size)


def _layer_crossing(model_type: str) -> dict[str, Any]:
    """Return the entries of a configuration that name the classes with layer crossing."""
    classes = CLASSES[model_type]
    names = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    return {
        "model_type": model_type + LAYER_CROSSING,
        "architectures": [f"{classes}ForCausalLM"],
        "auto_map": {auto: f"{LAYER_CROSSING_CODE.stem}.{classes}{name}" for auto, name in names.items()},
    }


def _value(target: nn.Module, settings: ModelSettings, name: str, weights: Callable[[str], Tensor]) -> Tensor:
    """Return a parameter of the model of ``transformers``, given those of ours."""
    path, _, leaf = name.rpartition(".")
    parts = [weights(f"{module}.{leaf}") for module in module_names(settings, path)]
    value = torch.cat(parts) if len(parts) > 1 else parts[0]
    module = target.get_submodule(path)
    kind = kind_of(module)
    return kind.restore(module, value) if kind is not None and leaf == "weight" else value
