"""Dense GPT-2 and Llama language models in plain PyTorch."""

from .build import build_model
from .count import flops_per_token, parameter_count
from .init import InitRule
from .language_model import IGNORED_TARGET, LanguageModel
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
