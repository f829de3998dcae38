"""Base classes of language models, and the decoder that GPT-2 and Llama share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..lowrank.init import generator_for
from .documents import Documents, find_documents
from .init import InitRule, init_rule
from .layers import Block, Rotary
from .loss import summed_loss
from .plan import ModelPlan
from .settings import ModelSettings
from .values import InitialValues


class RuleValues:
    """Initial values with each parameter drawn independently from the seed and its name.

    Args:
        model: the model, which may be on ``meta``.
        rule: function that returns the initialisation of a parameter name.
        seed: seed of the values.
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
    """Summed cross-entropy, as a module so that it can be compiled separately."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, T, vocab_size) of any dtype, targets (B, T) int64 -> float32 scalar in nats."""
        return summed_loss(logits, targets)


class LanguageModel(nn.Module):
    """Base class of the models that the trainer supports.

    Attributes:
        vocab_size: number of logits per token.
        max_seq_len: maximum sequence length in tokens.
        num_layers: number of blocks.
        attention_size: number of query heads times the head dimension.
        settings: the settings of the model.
        separator_id: id of the token that separates documents, needed if the settings separate them.
    """

    vocab_size: int
    max_seq_len: int
    num_layers: int
    attention_size: int
    settings: ModelSettings
    separator_id: int | None = None

    def documents(self, input_ids: Tensor) -> Documents | None:
        """Return the documents of a batch, or None if the settings do not separate them.

        Raises:
            ValueError: if ``separator_id`` is not set.
        """
        mask, restart = self.settings.mask_documents, self.settings.restart_positions
        if not (mask or restart):
            return None
        if self.separator_id is None:
            raise ValueError("the settings separate documents; set separator_id to the token between them")
        return find_documents(input_ids, self.separator_id, mask=mask, restart=restart)

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the logits, or the summed loss if ``targets`` is given.

        Args:
            input_ids: (B, T) int64.
            targets: (B, T) int64. ``targets[:, t]`` is the token that follows ``input_ids[:, t]``, or -100 to ignore
                the position.

        Returns:
            Logits (B, T, vocab_size) in the compute dtype, or the sum (not the mean) of the token cross-entropies in
            nats as a float32 scalar. The caller divides it by the global token count.

        Raises:
            ValueError: if T is greater than ``max_seq_len``.
        """
        raise NotImplementedError

    def check_length(self, input_ids: Tensor) -> None:
        """Raise ValueError if the sequences are longer than ``max_seq_len``."""
        length = input_ids.size(1)
        if length > self.max_seq_len:
            raise ValueError(f"a sequence of {length} tokens is longer than model.max_seq_len {self.max_seq_len}")

    @property
    def plan(self) -> ModelPlan:
        """Description of the model for the engines."""
        raise NotImplementedError

    def initial_values(self, seed: int) -> InitialValues:
        """Return the initial values of the dense model. The model may be on ``meta``."""
        raise NotImplementedError


class Decoder(LanguageModel):
    """A decoder-only transformer: ``tok_embed``, ``blocks``, ``final_norm`` and ``head``.

    ``head`` has no bias. With ``settings.tied`` it shares the weight of ``tok_embed``, and ``named_parameters()`` lists
    the weight under that name. Every block maps one (B, T, hidden_size) tensor to another. With
    ``settings.layer_crossing`` it also takes and returns the outputs of linear layers by name.
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
        # Moving a module off meta replaces the parameters of each submodule separately, which unties shared weights.
        super()._apply(fn, recurse)
        self._tie()
        return self

    def embed(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the input of the first block: (B, T) int64 -> (B, T, hidden_size).

        Args:
            input_ids: (B, T) int64.
            positions: (B, T) int64 position numbers, or None for 0..T-1.
        """
        return self.tok_embed(input_ids)

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        self.check_length(input_ids)
        documents = self.documents(input_ids)
        x = self.embed(input_ids, documents.positions if documents else None)
        outputs: dict[str, Tensor] = {}
        for block in self.blocks:
            if self.settings.layer_crossing:
                x, outputs = block(x, outputs, documents)
            else:
                x = block(x, None, documents)
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
        """Return the initialisation of a parameter of the dense model; see ``init_rule``."""
        return init_rule(parameter_name, self.settings.depth)
