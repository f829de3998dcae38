"""Language models: GPT-2 and Llama in plain PyTorch, and the causal language models of ``transformers``."""

from .build import build_model
from .count import flops_per_token, parameter_count
from .init import InitRule
from .language_model import LanguageModel
from .loss import IGNORED_TARGET
from .settings import ModelSettings

__all__ = [
    "IGNORED_TARGET",
    "InitRule",
    "LanguageModel",
    "ModelSettings",
    "build_model",
    "flops_per_token",
    "parameter_count",
]
