"""Dense GPT-2 and Llama language models in plain PyTorch."""

from inrank_dist.models.build import build_model
from inrank_dist.models.count import flops_per_token, parameter_count
from inrank_dist.models.init import InitRule
from inrank_dist.models.language_model import IGNORED_TARGET, LanguageModel
from inrank_dist.models.settings import ModelSettings

__all__ = [
    "IGNORED_TARGET",
    "InitRule",
    "LanguageModel",
    "ModelSettings",
    "build_model",
    "flops_per_token",
    "parameter_count",
]
