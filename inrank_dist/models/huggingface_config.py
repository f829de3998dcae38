"""Validation of ``model.config``, which selects a model of ``transformers``. Nothing is downloaded."""

import inspect
import json
from collections.abc import Mapping
from typing import Any

from ..runtime.errors import UserError, install, nearest
from ..runtime.home import expand_home
from ..runtime.yaml_text import shown

OF_A_FILE = (
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
    "quantization_config", "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
"""Keys of a config.json that are ignored, since the model is trained from scratch with another tokenizer."""

LEGACY_ROPE = ("partial_rotary_factor", "rope_scaling", "rope_theta")
"""Predecessors of ``rope_parameters``, which transformers 5 still accepts."""


LAYER_CROSSING = "_layer_crossing"
"""End of the ``model_type`` of exported models with layer crossing."""


def read_config(value: Any, max_seq_len: int) -> dict[str, Any]:
    """Read and validate ``model.config``.

    Args:
        value: a mapping, or a folder that contains a config.json.
        max_seq_len: sequence length that the model must support.

    Returns:
        The configuration as a mapping that includes ``model_type``.

    Raises:
        UserError: if the value does not describe a supported causal language model, or ``transformers`` cannot be
            imported.
    """
    from_file = isinstance(value, str)
    mapping = _read_folder(value) if from_file else value
    if not isinstance(mapping, Mapping) or not isinstance(mapping.get("model_type"), str):
        raise UserError(
            f"model.config is {shown(value)}; write a mapping such as {{model_type: qwen3, hidden_size: 256}}, or a "
            "folder whose config.json has a model_type"
        )
    cls = _config_class(mapping["model_type"])
    known = _known_keys(cls)
    if from_file:
        mapping = {key: each for key, each in mapping.items() if key in known and key not in OF_A_FILE}
    elif unknown := sorted(mapping.keys() - known):
        raise UserError(f"model.config has no key {unknown[0]!r} for {cls.model_type}{nearest(unknown[0], known)}")
    config = _make(cls, mapping)
    _refuse_other_kinds(config)
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and max_seq_len > longest:
        raise UserError(
            f"model.max_seq_len is {max_seq_len} but max_position_embeddings in model.config is {longest}; write at "
            f"most {longest}, or a larger max_position_embeddings"
        )
    return dict(mapping)


def make_config(mapping: Mapping[str, Any], vocab_size: int) -> Any:
    """Create the ``transformers`` configuration for a tokenizer of ``vocab_size`` tokens, with ``use_cache=False``.

    Args:
        mapping: result of ``read_config``.
        vocab_size: vocabulary size of the tokenizer.

    Raises:
        UserError: if the mapping contains a smaller ``vocab_size``, or ``transformers`` rejects the configuration.
    """
    written = mapping.get("vocab_size")
    if isinstance(written, int) and written < vocab_size:
        raise UserError(
            f"vocab_size in model.config is {written} but the tokenizer has {vocab_size} tokens; leave it out, or "
            f"write a tokenizer.vocab_size of at most {written}"
        )
    config = _make(_config_class(mapping["model_type"]), {**mapping, "vocab_size": vocab_size, "use_cache": False})
    # The special tokens belong to another tokenizer.
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        try:
            setattr(config, key, None)
        except Exception:  # some classes require an integer, and raise exceptions of any type
            setattr(config, key, 0)
    return config


def dtype_key(config: Any) -> str:
    """Return the name that a configuration has for its dtype, which was another one before transformers 5."""
    return "dtype" if hasattr(config, "dtype") else "torch_dtype"


def _read_folder(folder: str) -> Any:
    file = expand_home(folder, "model.config") / "config.json"
    advice = "write a folder with a config.json, or a mapping such as {model_type: qwen3, hidden_size: 256}"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"model.config is {folder}, but {file} cannot be read ({error.strerror}); {advice}; nothing is downloaded"
        ) from None
    except ValueError:
        raise UserError(f"model.config is {folder}, but {file} is not JSON; {advice}") from None


def _config_class(model_type: str) -> Any:
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        raise UserError(
            f"model.name is hf, but transformers cannot be imported ({error}); {install('hf')}, or "
            "model.name: gpt2 or llama"
        ) from None
    if model_type.endswith(LAYER_CROSSING):
        raise UserError(
            f"model_type in model.config is {model_type!r}, which transformers does not have; write model.name: "
            f"{model_type.removesuffix(LAYER_CROSSING)} and model.layer_crossing: true"
        )
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"model_type in model.config is {model_type!r}{nearest(model_type, CONFIG_MAPPING.keys())}")
    return CONFIG_MAPPING[model_type]


def _known_keys(cls: Any) -> set[str]:
    known = set(_make(cls, {}).to_dict()) | set(cls.attribute_map) | set(inspect.signature(cls.__init__).parameters)
    if "rope_parameters" in known:
        known |= set(LEGACY_ROPE)
    return known - {"self", "args", "kwargs"} | {"model_type"}


def _make(cls: Any, mapping: Mapping[str, Any]) -> Any:
    try:
        return cls(**{key: value for key, value in mapping.items() if key != "model_type"})
    except Exception as error:  # configuration classes report invalid values with exceptions of any type
        raise refused(cls.model_type, error) from None


def refused(model_type: str, error: Exception) -> UserError:
    """Return the one-line error for a configuration that ``transformers`` rejects."""
    said = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"model.config is refused by transformers for {model_type}: {said}; write other values")


def _refuse_other_kinds(config: Any) -> None:
    """Raise UserError unless the configuration is that of a decoder-only language model with causal attention."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    name = config.model_type
    advice = "write that of a causal language model such as gpt2, llama or qwen3"
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model_type in model.config is {name!r}, an encoder and a decoder; {advice}")
    if set(getattr(config, "sub_configs", ())) - PARTS_OF_ONE:
        text = f"{name}_text"
        advice = f"write {text}" if text in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else advice
        raise UserError(f"model_type in model.config is {name!r}, a model of several parts; {advice}")
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"model_type in model.config is {name!r}, not a causal language model; {advice}")
    may_be_encoder = name in MODEL_FOR_MASKED_LM_MAPPING_NAMES or name in ENCODERS
    if name in NOT_CAUSAL or (may_be_encoder and not getattr(config, "is_decoder", False)):
        why = advice if name in NOT_CAUSAL else f"{advice}, or is_decoder: true"
        raise UserError(f"model_type in model.config is {name!r}, whose tokens see later ones; {why}")


PARTS_OF_ONE = {"attn_config", "ffn_config"}
"""Sub-configurations that describe layers of one language model rather than a model of several parts."""

ENCODERS = ("bert-generation",)
"""Models with bidirectional attention unless ``is_decoder`` is set, in addition to the masked language models."""

NOT_CAUSAL = ("cpmant", "xlm", "xlnet")
"""Models with bidirectional attention that ``transformers`` lists as causal."""
