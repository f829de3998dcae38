"""GPT-2 and Llama in ``transformers``: their configurations and the names of their modules."""

from typing import Any

from ..models import ModelSettings
from ..models.huggingface import PREFIX

GPT2 = {
    "transformer.wte": ("tok_embed",),
    "transformer.wpe": ("pos_embed",),
    "transformer.h.{}.ln_1": ("blocks.{}.attention_norm",),
    "transformer.h.{}.attn.c_attn": ("blocks.{}.attention.q", "blocks.{}.attention.k", "blocks.{}.attention.v"),
    "transformer.h.{}.attn.c_proj": ("blocks.{}.attention.out",),
    "transformer.h.{}.ln_2": ("blocks.{}.mlp_norm",),
    "transformer.h.{}.mlp.c_fc": ("blocks.{}.mlp.up",),
    "transformer.h.{}.mlp.c_proj": ("blocks.{}.mlp.down",),
    "transformer.ln_f": ("final_norm",),
    "lm_head": ("head",),
}
"""Module of ``transformers`` -> ours; ``{}`` is the block. The outputs of several modules are concatenated."""

LLAMA = {
    "model.embed_tokens": ("tok_embed",),
    "model.layers.{}.input_layernorm": ("blocks.{}.attention_norm",),
    "model.layers.{}.self_attn.q_proj": ("blocks.{}.attention.q",),
    "model.layers.{}.self_attn.k_proj": ("blocks.{}.attention.k",),
    "model.layers.{}.self_attn.v_proj": ("blocks.{}.attention.v",),
    "model.layers.{}.self_attn.o_proj": ("blocks.{}.attention.out",),
    "model.layers.{}.post_attention_layernorm": ("blocks.{}.mlp_norm",),
    "model.layers.{}.mlp.gate_proj": ("blocks.{}.mlp.gate",),
    "model.layers.{}.mlp.up_proj": ("blocks.{}.mlp.up",),
    "model.layers.{}.mlp.down_proj": ("blocks.{}.mlp.down",),
    "model.norm": ("final_norm",),
    "lm_head": ("head",),
}
"""As ``GPT2``."""


def module_names(settings: ModelSettings, module: str) -> tuple[str, ...]:
    """Return our names of a module of ``transformers``.

    Args:
        module: name of a module that has parameters.

    Raises:
        KeyError: our model has no such module.
    """
    if settings.name == "hf":
        return (PREFIX + module,)
    parts = module.split(".")
    block = next((part for part in parts if part.isdigit()), None)
    pattern = ".".join("{}" if part is block else part for part in parts)
    table = GPT2 if settings.name == "gpt2" else LLAMA
    return tuple(name.format(block) for name in table[pattern])


def transformers_config(settings: ModelSettings, vocab_size: int) -> dict[str, Any]:
    """Return the configuration of the same model in ``transformers``, with its ``model_type``.

    With layer crossing it is that of the model without, which has the same parameters.
    """
    if settings.name == "hf":
        assert isinstance(settings.config, dict)
        return {**settings.config, "vocab_size": vocab_size}
    common = {"vocab_size": vocab_size, "tie_word_embeddings": settings.tied}
    if settings.name == "gpt2":
        return common | {
            "model_type": "gpt2",
            "n_positions": settings.max_seq_len,
            "n_embd": settings.width,
            "n_layer": settings.depth,
            "n_head": settings.heads,
            "n_inner": settings.mlp_size,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": settings.norm_eps,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), settings.dropout),
        }
    return common | {
        "model_type": "llama",
        "max_position_embeddings": settings.max_seq_len,
        "hidden_size": settings.width,
        "intermediate_size": settings.mlp_size,
        "num_hidden_layers": settings.depth,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": settings.norm_eps,
        "rope_theta": settings.rotary_base,
        "attention_bias": False,
        "mlp_bias": False,
    }
