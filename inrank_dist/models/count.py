"""Sizes that follow from the shapes alone: parameters, and floating-point operations per token."""

import torch
from torch import nn

from .build import build_model
from .language_model import LanguageModel
from .settings import ModelSettings


def parameter_count(settings: ModelSettings, vocab_size: int) -> int:
    """Exact number of parameters of the dense model, a tied weight counted once; allocates no memory."""
    with torch.device("meta"):
        model = build_model(settings, vocab_size)
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: LanguageModel, seq_len: int) -> int:
    """Forward plus backward floating-point operations per token, for model-FLOPs utilisation (MFU).

    6 for each entry of a matrix (4 if it is frozen: no gradient of its own) plus 12 * layers * attention size *
    seq_len for attention, without a discount for causality and without recomputation (PaLM, arXiv
    2204.02311, appendix B). Matrices are whatever the model holds now, so low-rank factors count as
    themselves; embeddings are look-ups and count only where they are also the head. `model` may be on
    `meta`; where an engine has emptied or flattened the weights, pass an unsharded copy.
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
