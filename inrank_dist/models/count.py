"""Parameter counts and floating-point operations per token, computed from shapes."""

import torch
from torch import nn

from .build import build_model
from .language_model import LanguageModel
from .settings import ModelSettings


def parameter_count(settings: ModelSettings, vocab_size: int) -> int:
    """Return the number of parameters of the dense model, without allocating memory. A tied weight counts once."""
    with torch.device("meta"):
        model = build_model(settings, vocab_size)
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: LanguageModel, seq_len: int) -> int:
    """Return the floating-point operations per token of a forward and a backward pass.

    This is the count used for model FLOPs utilization (MFU) in PaLM (arXiv 2204.02311, appendix B): 6 operations for
    each matrix entry, plus ``12 * num_layers * attention_size * seq_len`` for attention. The causal mask and
    recomputation are ignored. A frozen matrix has no weight gradient and counts 4 operations per entry. Low-rank
    factors count as matrices. An embedding is a lookup and counts only if it is tied to the head.

    Args:
        model: an unsharded model; may be on ``meta``.
        seq_len: sequence length in tokens.
    """
    matrices = {
        parameter
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() >= 2
    }
    linear = sum((6 if matrix.requires_grad else 4) * matrix.numel() for matrix in matrices)
    return linear + 12 * model.num_layers * model.attention_size * seq_len
