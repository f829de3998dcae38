"""Construction of a model from its settings."""

from .gpt2 import GPT2
from .language_model import LanguageModel
from .llama import Llama
from .settings import ModelSettings


def build_model(settings: ModelSettings, vocab_size: int, separator_id: int | None = None) -> LanguageModel:
    """Build a model on the default device in the default dtype.

    Its parameters do not have their initial values yet; ``model.initial_values(seed)`` provides them by name. Under
    ``torch.device("meta")`` no memory is allocated.

    Args:
        settings: the settings of the model.
        vocab_size: number of logits per token.
        separator_id: id of the token that separates documents, needed if the settings separate them.
    """
    model = _architecture(settings, vocab_size)
    model.separator_id = separator_id
    return model


def _architecture(settings: ModelSettings, vocab_size: int) -> LanguageModel:
    if settings.name == "hf":
        from .huggingface import HuggingFaceLM  # transformers takes seconds to import

        return HuggingFaceLM(settings, vocab_size)
    return GPT2(settings, vocab_size) if settings.name == "gpt2" else Llama(settings, vocab_size)
