"""From settings to a model."""

from .gpt2 import GPT2
from .language_model import LanguageModel
from .llama import Llama
from .settings import ModelSettings


def build_model(settings: ModelSettings, vocab_size: int) -> LanguageModel:
    """The model that `settings` describe, on the device and in the dtype that are the default now.

    Its weights are not initial values yet: fill every parameter by the rule `model.init_std(name)` gives.
    Built under ``with torch.device("meta")`` it holds no memory; ``model.to_empty(device=...)`` followed by
    ``model.reset_buffers()`` then makes it real, with tied weights still tied.
    """
    return GPT2(settings, vocab_size) if settings.name == "gpt2" else Llama(settings, vocab_size)
