"""GPT-2 and Llama with layer crossing, for ``transformers``.

``inrank export --format hf`` copies this file into the folder of a model that was trained with
``model.layer_crossing``. It imports torch and transformers only. Load the folder with
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.

Each linear layer of a block adds the output of the same layer in the previous block, ``y = W x + W' x'`` (after LaX,
Zhang et al., arXiv 2505.21732). The outputs belong to single tokens, so that a key-value cache holds all that later
tokens need. Everything else is the model of ``transformers``.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, LlamaConfig, LlamaForCausalLM, LlamaModel

GPT2_LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
LLAMA_LAYERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@contextmanager
def layer_crossing(blocks: Iterable[nn.Module], names: Iterable[str]) -> Iterator[None]:
    """Let the linear layers of the blocks cross within one forward pass.

    Hooks are registered for each pass, so they also apply to layers that were wrapped or replaced after construction.
    """
    outputs: dict[str, Tensor] = {}
    thread = get_ident()

    def crossed(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor | None:
            if get_ident() != thread:  # a forward pass of another thread, which has its own hooks
                return None
            before, outputs[name] = outputs.get(name), output
            return output if before is None else output + before.to(output.device)

        return hook

    handles = []
    try:
        for block in blocks:
            handles += [block.get_submodule(name).register_forward_hook(crossed(name)) for name in names]
        yield
    finally:
        for handle in handles:
            handle.remove()


# The recomputation of a checkpointed block would run without the hooks, so checkpointing is refused. torch.compile
# would compile anew for the hooks of each pass, so it skips these models.


class GPT2LayerCrossingConfig(GPT2Config):
    model_type = "gpt2_layer_crossing"


class GPT2LayerCrossingModel(GPT2Model):
    config_class = GPT2LayerCrossingConfig
    supports_gradient_checkpointing = False

    @torch.compiler.disable
    @wraps(GPT2Model.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with layer_crossing(self.h, GPT2_LAYERS):
            return super().forward(*args, **kwargs)


class GPT2LayerCrossingForCausalLM(GPT2LMHeadModel):
    config_class = GPT2LayerCrossingConfig
    supports_gradient_checkpointing = False

    def __init__(self, config: GPT2LayerCrossingConfig) -> None:
        super().__init__(config)
        self.transformer = GPT2LayerCrossingModel(config)
        self.post_init()


class LlamaLayerCrossingConfig(LlamaConfig):
    model_type = "llama_layer_crossing"


class LlamaLayerCrossingModel(LlamaModel):
    config_class = LlamaLayerCrossingConfig
    supports_gradient_checkpointing = False

    @torch.compiler.disable
    @wraps(LlamaModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with layer_crossing(self.layers, LLAMA_LAYERS):
            return super().forward(*args, **kwargs)


class LlamaLayerCrossingForCausalLM(LlamaForCausalLM):
    config_class = LlamaLayerCrossingConfig
    supports_gradient_checkpointing = False

    def __init__(self, config: LlamaLayerCrossingConfig) -> None:
        super().__init__(config)
        self.model = LlamaLayerCrossingModel(config)
        self.post_init()
