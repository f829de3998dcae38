"""From settings to a model."""

from .gpt2 import GPT2
from .language_model import LanguageModel
from .llama import Llama
from .settings import ModelSettings


def build_model(settings: ModelSettings, vocab_size: int) -> LanguageModel:
    """The model that `settings` describe, on the device and in the dtype that are the default now.

    Its weights are not initial values yet; `model.initial_values(seed)` gives them by name. Built under
    ``with torch.device("meta")`` it holds no memory.
    """
    if settings.name == "hf":
        from .huggingface import HuggingFaceLM  # transformers takes seconds to import

        return HuggingFaceLM(settings, vocab_size)
    return GPT2(settings, vocab_size) if settings.name == "gpt2" else Llama(settings, vocab_size)
