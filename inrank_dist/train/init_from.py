"""Initial values of a run: random, or loaded from ``model.init_from``."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..config import Config, load_config
from ..data import Tokenizer
from ..hub.factors import DESCRIPTION, read_factors, refuse_activation, refuse_other_model
from ..hub.weights import Cut, Weights
from ..models import LanguageModel
from ..models.values import InitialValues, LoadedValues
from ..runtime.context import Context
from ..runtime.errors import UserError, install
from ..runtime.home import expand_home, searched
from .checkpoint import Checkpoint, TensorReader, branch_point, peek_checkpoint


def initial_values(
    config: Config, skeleton: LanguageModel, tokenizer: Tokenizer | None = None, context: Context | None = None
) -> InitialValues:
    """Return the initial values of the dense model.

    Args:
        config: the configuration.
        skeleton: the dense model on ``meta``.
        tokenizer: tokenizer of the run, which must be that of the folder if the folder has one of ours.
        context: context of a job, whose processes divide the hashing of a checkpoint. None: tensors are not hashed,
            which suffices to find mistakes before a job starts.

    Raises:
        UserError: ``model.init_from`` is not a folder that holds this model; on all processes of ``context``.
    """
    random = skeleton.initial_values(config.run.seed)
    if config.model.init_from is None:
        return random
    folder = expand_home(config.model.init_from, "model.init_from")
    try:
        checkpoint = _checkpoint(folder, context)

        def load() -> Callable[[str], Tensor]:
            if checkpoint:
                _check_tokenizer(tokenizer, checkpoint.tokenizer_file)
                return _of_run(checkpoint, config, skeleton)
            if (folder / DESCRIPTION).exists():
                _check_tokenizer(tokenizer, folder / "tokenizer.model")
                return read_factors(folder, config.model, skeleton)
            return _of_transformers(folder, config, skeleton)

        return LoadedValues(load() if context is None else context.on_all_ranks(load), random)
    except UserError as error:
        raise UserError(f"model.init_from{searched(folder)}: {error}") from None


def _checkpoint(folder: Path, context: Context | None) -> Checkpoint | None:
    """Return the newest checkpoint of a run, the same in all processes, or None if the folder is no run."""

    def is_run() -> bool:
        return (folder / "checkpoints").is_dir()

    if context is not None:
        return branch_point(folder, None, context) if context.gather(context.on_rank_zero(is_run))[0] else None
    found = peek_checkpoint(folder) if is_run() else None
    if found is None and is_run():
        raise UserError(f"{folder} holds no checkpoint; train it first")
    return found


def _check_tokenizer(tokenizer: Tokenizer | None, file: Path) -> None:
    """Raise ``UserError`` unless a tokenizer is that of a file. With another one, each row would mean another token."""
    if tokenizer is not None and tokenizer.fingerprint != Tokenizer.load(file).fingerprint:
        raise UserError(f"that model was trained with another tokenizer; write tokenizer.path: {file}")


def _of_run(checkpoint: Checkpoint, config: Config, skeleton: LanguageModel) -> Weights:
    trained, _ = load_config(checkpoint.config_file)
    state, folder = checkpoint.state, checkpoint.run_folder
    their_vocab_size = trained.model.padded(state.vocab_size)
    refuse_other_model(folder, trained.model, their_vocab_size, config.model, skeleton.vocab_size)
    refuse_activation(folder, state.layout, trained.lowrank.activation)
    return dense_weights(checkpoint, trained, skeleton)


def dense_weights(checkpoint: Checkpoint, config: Config, skeleton: LanguageModel, cut: Cut | None = None) -> Weights:
    """Return the parameters of a checkpoint as those of its dense model, without loading them.

    Args:
        config: the configuration of the checkpoint.
        skeleton: its dense model on ``meta``.
        cut: further truncation of the factors, or None.
    """
    state = checkpoint.state
    return Weights(skeleton, state.layout, TensorReader(checkpoint.folder), config.base_scale(state.step), cut)


def _of_transformers(folder: Path, config: Config, skeleton: LanguageModel) -> Callable[[str], Tensor]:
    try:
        from ..hub.loading import TransformersWeights
    except ImportError as error:
        raise UserError(f"{folder} needs transformers ({error}); {install('hf')}") from None
    return TransformersWeights(folder, config.model, skeleton)
