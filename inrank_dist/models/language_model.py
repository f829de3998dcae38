"""What the two models have in common: embed, run the blocks, project to the vocabulary, sum the loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..lowrank.init import generator_for
from .init import InitRule, init_rule
from .layers import Block, Rotary
from .loss import summed_loss
from .plan import ModelPlan
from .settings import ModelSettings
from .values import InitialValues


class RuleValues:
    """Values drawn for each parameter by itself, from the seed and its name, by the model's own rules.

    Args:
        model: may be on ``meta``.
        rule: parameter name -> how it is drawn.
    """

    def __init__(self, model: "Decoder", rule: Callable[[str], InitRule], seed: int) -> None:
        self._shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
        self._model, self._rule, self._seed = model, rule, seed

    def parameter(self, name: str) -> Tensor:
        shape, rule = self._shapes[name], self._rule(name)
        if rule.kind == "normal":
            return torch.randn(shape, generator=generator_for(self._seed, name)) * rule.std
        return torch.ones(shape) if rule.kind == "ones" else torch.zeros(shape)

    def std(self, name: str) -> float:
        return self._rule(name).std

    def buffer(self, name: str) -> Tensor:
        rotary = self._model.get_submodule(name.rpartition(".")[0])
        assert isinstance(rotary, Rotary)
        table: Tensor = getattr(Rotary(rotary.head_dim, rotary.max_seq_len, rotary.base), name.rpartition(".")[2])
        return table


class TokenLoss(nn.Module):
    """Sum of the cross-entropies of tokens; a module so that it can be compiled by itself."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, T, vocab_size) of any dtype and targets (B, T) int64 -> nats, a float32 scalar."""
        return summed_loss(logits, targets)


class LanguageModel(nn.Module):
    """What the trainer trains: logits of tokens, or the summed loss.

    Attributes:
        vocab_size: number of logits of a token.
        max_seq_len: longest sequence in tokens.
        num_layers: number of blocks.
        attention_size: width of the attention, that is, heads times the width of one.
    """

    vocab_size: int
    max_seq_len: int
    num_layers: int
    attention_size: int

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or the summed loss when `targets` are given.

        `input_ids` and `targets`: (B, T) int64; `targets[:, t]` is the token that follows `input_ids[:, t]`,
        or -100 where nothing is to be learned. Returns logits (B, T, vocab_size) in the compute dtype, or the
        SUM of the token cross-entropies in nats, a float32 scalar: the caller divides by the global token
        count. Raises ValueError if T is above `max_seq_len`.
        """
        raise NotImplementedError

    def check_length(self, input_ids: Tensor) -> None:
        """Raise ValueError where a sequence is too long."""
        length = input_ids.size(1)
        if length > self.max_seq_len:
            raise ValueError(f"a sequence of {length} tokens is longer than model.max_seq_len {self.max_seq_len}")

    @property
    def plan(self) -> ModelPlan:
        """Where the parts of the model are."""
        raise NotImplementedError

    def initial_values(self, seed: int) -> InitialValues:
        """Values of the dense model before training; the model may be on ``meta``."""
        raise NotImplementedError


class Decoder(LanguageModel):
    """A decoder-only transformer: `tok_embed`, `blocks`, `final_norm`, `head`.

    `head` has no bias; with `settings.tied` its weight is the Parameter of `tok_embed`, under whose name
    `named_parameters()` lists it. Every block takes and returns one tensor, (B, T, hidden_size), and with
    `settings.layer_crossing` the outputs of its linear layers by name.
    """

    def __init__(self, settings: ModelSettings, vocab_size: int, blocks: list[Block], final_norm: nn.Module) -> None:
        super().__init__()
        self.settings = settings
        self.vocab_size, self.max_seq_len = vocab_size, settings.max_seq_len
        self.num_layers, self.attention_size = settings.depth, settings.width
        self.tok_embed = nn.Embedding(vocab_size, settings.width)
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = final_norm
        self.head = nn.Linear(settings.width, vocab_size, bias=False)
        self.token_loss = TokenLoss()
        self._tie()

    def _tie(self) -> None:
        if self.settings.tied:
            self.head.weight = self.tok_embed.weight

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Decoder":
        # torch replaces each module's parameter by itself when it leaves meta, which unties a shared one.
        super()._apply(fn, recurse)
        self._tie()
        return self

    def embed(self, input_ids: Tensor) -> Tensor:
        """Input of the first block: (B, T) int64 -> (B, T, hidden_size)."""
        return self.tok_embed(input_ids)

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        self.check_length(input_ids)
        x = self.embed(input_ids)
        outputs: dict[str, Tensor] = {}
        for block in self.blocks:
            if self.settings.layer_crossing:
                x, outputs = block(x, outputs)
            else:
                x = block(x)
        logits = self.head(self.final_norm(x))
        if targets is None:
            return logits
        loss: Tensor = self.token_loss(logits, targets)
        return loss

    @property
    def plan(self) -> ModelPlan:
        tied = self.head.weight is self.tok_embed.weight
        blocks = tuple(f"blocks.{index}" for index in range(len(self.blocks)))
        return ModelPlan(blocks, () if tied else ("tok_embed", "head"), "tok_embed", ("token_loss",))

    def initial_values(self, seed: int) -> InitialValues:
        return RuleValues(self, self.init_std, seed)

    def init_std(self, parameter_name: str) -> InitRule:
        """Initial values of a parameter of the dense model; by name only, so it needs no values and no shape.

        The rules, their source and the KeyError for other names: `init.init_rule`.
        """
        return init_rule(parameter_name, self.settings.depth)
