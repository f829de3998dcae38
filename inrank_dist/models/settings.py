"""Settings of the model (YAML section ``model``)."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from ..runtime.errors import UserError
from ..runtime.resume import OnResume
from ..runtime.words import nearest_divisors

LARGEST = {
    "num_layers": 2_048,
    "hidden_size": 262_144,
    "intermediate_size": 1_048_576,
    "max_seq_len": 16_777_216,
}
"""Upper limits, far above existing models. Even on ``meta`` blocks take time and memory, and sizes could overflow."""

SUPPORTED_BY_HF = (
    "name",
    "config",
    "max_seq_len",
    "init_from",
    "vocab_size",
    "mask_documents",
    "restart_positions",
)
"""Settings that also apply to ``model.name: hf``."""


def _size() -> Any:
    """Return a field that is required for gpt2 and llama. For hf, ``model.config`` contains the sizes."""
    return field(default=None, metadata={"required_unless": ("name", "hf")})


@dataclass(kw_only=True)
class ModelSettings:
    """Settings of the dense model. Fields contain the configured values; properties resolve omitted ones."""

    ON_RESUME: ClassVar[OnResume] = OnResume(
        fixed=(
            "name",
            "num_layers",
            "num_kv_heads",
            "hidden_size",
            "intermediate_size",
            "max_seq_len",
            "tie_embeddings",
            "vocab_size",
            "init_from",
        )
    )

    name: Literal["gpt2", "llama", "hf"] = "gpt2"
    """Architecture: gpt2 (LayerNorm, GELU, learned positions, biases), llama (RMSNorm, SwiGLU, rotary positions, no
    biases) or hf (a causal language model of transformers, defined by model.config)."""
    config: dict[str, Any] | str | None = None
    """For hf: a mapping such as {model_type: qwen3, hidden_size: 256}, or a folder with a config.json. The keys besides
    model_type are those of the model's configuration class in transformers. The tokenizer determines the
    vocab_size."""
    num_layers: int | None = _size()
    """Number of transformer blocks (gpt2 and llama)."""
    num_heads: int | None = _size()
    """Number of attention (query) heads (gpt2 and llama). Must divide hidden_size."""
    num_kv_heads: int | None = None
    """Number of key and value heads (llama only). Must divide num_heads. null: num_heads."""
    hidden_size: int | None = _size()
    """Width of the residual stream (gpt2 and llama)."""
    intermediate_size: int | None = None
    """Hidden width of the MLP. null: 4 x hidden_size for gpt2; for llama 8/3 x hidden_size, rounded up to a multiple
    of 64, or of 256 if hidden_size is at least 2048 (4096 gives the published 11008)."""
    vocab_size: int | None = None
    """Number of rows of the embedding and of logits. null: that of the tokenizer. A larger number pads the vocabulary,
    for example to a multiple of 64, or to that of a loaded model."""
    max_seq_len: int
    """Maximum sequence length in tokens."""
    dropout: float = 0.0
    """Dropout probability for embeddings, attention weights and block outputs (gpt2 only)."""
    tie_embeddings: bool | None = None
    """Whether the output head shares the weight of the token embedding. null: true for gpt2, false for llama."""
    rope_theta: float | None = None
    """Base of the rotary frequencies (llama only). null: 10000."""
    layer_crossing: bool = False
    """Add to the output of each linear layer the output of the same layer in the previous block (after LaX, arXiv
    2505.21732). Adds no parameters and almost no computation. Lowers the loss in our study, dense or low-rank. With
    train.activation_checkpointing these outputs are kept in memory as well."""
    init_from: str | None = None
    """Folder that provides the initial weights: a dense model of transformers with safetensors, a run, or exported
    factors. With low-rank layers, see lowrank.init: loaded. null: random weights. A run that resumes does not read
    it."""
    mask_documents: bool = False
    """Let each token attend only to tokens of its own document. The separator of documents is the first token of the
    document after it. Attention then takes a mask, which is slower than plain causal attention. An exported model takes
    its input for one document. With hf, needs restart_positions as well."""
    restart_positions: bool = False
    """Number the positions of each document from 0. With hf, needs mask_documents as well."""
    norm_eps: float = 1e-5
    """Epsilon added to the variance (gpt2) or the mean square (llama) in every norm."""

    def __post_init__(self) -> None:
        """Validate the settings; raise UserError if they are inconsistent."""
        if self.name not in ("gpt2", "llama", "hf"):
            raise UserError(f"model.name is {self.name!r}; write gpt2, llama or hf")
        for key in (
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "hidden_size",
            "intermediate_size",
            "max_seq_len",
            "rope_theta",
            "norm_eps",
            "vocab_size",
        ):
            value = getattr(self, key)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"model.{key} is {value}; it must be positive; write a number above 0")
            if value is not None and value > LARGEST.get(key, math.inf):
                raise UserError(f"model.{key} is {value}; write a number of at most {LARGEST[key]}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout is {self.dropout}; it is a probability; write a number from 0 to below 1")
        if self.name == "hf":
            self._check_hf()
            return
        if self.config is not None:
            raise UserError(
                f"model.config is written but model.name is {self.name}; leave it out or write model.name: hf"
            )
        if self.width % self.heads:
            fitting = math.ceil(self.width / self.heads) * self.heads
            raise UserError(
                f"model.hidden_size is {self.hidden_size}, which model.num_heads {self.num_heads} does not divide; "
                f"write model.num_heads {nearest_divisors(self.width, self.heads)}, or model.hidden_size {fitting}"
            )
        if self.name == "gpt2":
            self._reject_llama_only()
        else:
            self._check_llama()

    def _check_hf(self) -> None:
        for setting in fields(self):
            if setting.name in SUPPORTED_BY_HF:
                continue
            if getattr(self, setting.name) != setting.default:
                raise UserError(
                    f"model.{setting.name} is {getattr(self, setting.name)} but model.name is hf; leave it out and "
                    "write in model.config what that model calls it"
                )
        if self.mask_documents != self.restart_positions:
            off = "restart_positions" if self.mask_documents else "mask_documents"
            raise UserError(
                f"model.{off} is false, but the models of transformers separate documents by both; write true for "
                "model.mask_documents and model.restart_positions, or false"
            )
        from .huggingface_config import read_config  # transformers takes seconds to import

        self.config = read_config(self.config, self.max_seq_len)

    def _reject_llama_only(self) -> None:
        for key in ("num_kv_heads", "rope_theta"):
            value = getattr(self, key)
            if value is not None:
                raise UserError(
                    f"model.{key} is {value}, but gpt2 has no such part - leave it out or write model.name: llama"
                )

    def _check_llama(self) -> None:
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.num_kv_heads is {self.num_kv_heads}, which does not divide model.num_heads {self.num_heads}; "
                f"write {nearest_divisors(self.heads, self.kv_heads)}"
            )
        if self.head_dim % 2:
            even = nearest_divisors(self.width // 2, self.heads) if self.width % 2 == 0 else ""
            heads = f"model.num_heads {even}, or " if even else ""
            raise UserError(
                f"model.hidden_size is {self.hidden_size}, which gives {self.num_heads} heads of odd size"
                f" {self.head_dim}; rotary positions turn pairs; write {heads}model.hidden_size "
                f"{self.width + self.heads}"
            )
        if self.dropout:
            raise UserError(
                f"model.dropout is {self.dropout}, but the llama model has no dropout"
                "; write model.dropout: 0.0 or model.name: gpt2"
            )

    def padded(self, vocab_size: int) -> int:
        """Return the vocabulary size of the model.

        Args:
            vocab_size: vocabulary size of the tokenizer.

        Raises:
            UserError: ``vocab_size`` is smaller than that.
        """
        if self.vocab_size is None:
            return vocab_size
        if self.vocab_size < vocab_size:
            raise UserError(
                f"model.vocab_size is {self.vocab_size} but the tokenizer has {vocab_size} tokens; write at least "
                f"{vocab_size}, or null"
            )
        return self.vocab_size

    @property
    def architecture(self) -> str:
        """Name of the architecture; for hf followed by the ``model_type``."""
        return f"hf {self.config['model_type']}" if isinstance(self.config, dict) else self.name

    # The following properties apply to gpt2 and llama.

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self._given("num_layers")

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self._given("num_heads")

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self._given("hidden_size")

    def _given(self, key: str) -> int:
        value = getattr(self, key)
        if value is None:
            raise UserError(f"model.{key} is missing; write a whole number")
        return int(value)

    @property
    def head_dim(self) -> int:
        """Dimension of an attention head."""
        return self.width // self.heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        if self.name == "gpt2":
            return 4 * self.width
        multiple = 256 if self.width >= 2048 else 64
        return math.ceil(8 * self.width / (3 * multiple)) * multiple

    @property
    def tied(self) -> bool:
        """Whether the output head shares the weight of the token embedding."""
        return self.name == "gpt2" if self.tie_embeddings is None else self.tie_embeddings

    @property
    def rotary_base(self) -> float:
        """Base of the rotary frequencies."""
        return 10000.0 if self.rope_theta is None else self.rope_theta
