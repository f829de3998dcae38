"""A Llama of transformers that starts and grows as ours does, whose names for the same layers are others."""

from unittest.mock import patch

import torch
from runs import Run, train_in_worker
from torch import Tensor

from inrank_dist.config import Config
from inrank_dist.lowrank import init
from inrank_dist.lowrank.materialize import materialize
from inrank_dist.models import loss
from inrank_dist.models.huggingface import HuggingFaceLM, HuggingFaceValues
from inrank_dist.train.building import dense_skeleton

RENAMES = {
    "model.model.layers.": "blocks.",
    "model.model.embed_tokens": "tok_embed",
    "model.model.norm": "final_norm",
    "model.lm_head": "head",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.o_proj": "attention.out",
    "self_attn": "attention",
    "_proj": "",
}


def ours_of(name: object) -> str:
    """Our name of a layer or parameter of theirs; other words stay as they are."""
    text = str(name)
    for theirs, ours in RENAMES.items():
        text = text.replace(theirs, ours)
    return text


class OurValues(HuggingFaceValues):
    """Our values under their names, and their buffers."""

    ours: Config

    def __init__(self, model: HuggingFaceLM, seed: int) -> None:
        super().__init__(model, seed)
        self._ours = dense_skeleton(self.ours.model, model.vocab_size).initial_values(seed)

    def parameter(self, name: str) -> Tensor:
        return self._ours.parameter(ours_of(name))

    def std(self, name: str) -> float:
        return self._ours.std(ours_of(name))


def train_like_ours(config: Config, ours: Config) -> Run:
    """Train a model of transformers with the values, and the seeds of all that is drawn, of a config of ours."""
    seed_for = init.seed_for

    def renamed(seed: int, *names: object) -> int:
        return seed_for(seed, *map(ours_of, names))

    OurValues.ours = ours
    with (
        patch.object(HuggingFaceLM, "initial_values", lambda model, seed: OurValues(model, seed)),
        patch.object(init, "seed_for", renamed),
    ):
        return train_in_worker(config)


def train_in_chunks(config: Config) -> Run:
    """Train with the loss of so few tokens at a time that even a small vocabulary takes several chunks."""
    with patch.object(loss, "CHUNK", 5 * 301):
        return train_in_worker(config)


def with_values(model: HuggingFaceLM) -> HuggingFaceLM:
    """A model on ``meta`` with its initial values, without dropout."""
    values = model.initial_values(0)
    materialize(model, values.buffer, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values.parameter(name))
    return model.eval()
