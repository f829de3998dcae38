"""Initial values of a run: random, or loaded from ``model.init_from``."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..config import Config, load_config
from ..hub.factors import DESCRIPTION, read_factors, refuse_other_model
from ..hub.weights import Weights
from ..models import LanguageModel
from ..models.values import InitialValues, LoadedValues
from ..runtime.errors import UserError
from ..runtime.home import expand_home
from .checkpoint import TensorReader, find_checkpoint


def initial_values(config: Config, skeleton: LanguageModel) -> InitialValues:
    """Return the initial values of the dense model.

    Args:
        skeleton: the dense model on ``meta``.

    Raises:
        UserError: ``model.init_from`` is not a folder that holds this model.
    """
    random = skeleton.initial_values(config.run.seed)
    if config.model.init_from is None:
        return random
    folder = expand_home(config.model.init_from, "model.init_from")
    try:
        if (folder / "checkpoints").is_dir():
            return LoadedValues(_of_run(folder, config, skeleton), random)
        if (folder / DESCRIPTION).exists():
            return LoadedValues(read_factors(folder, config.model, skeleton), random)
        return LoadedValues(_of_transformers(folder, config, skeleton), random)
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from None


def _of_run(folder: Path, config: Config, skeleton: LanguageModel) -> Weights:
    checkpoint = find_checkpoint(folder)
    trained, _ = load_config(checkpoint.config_file)
    state = checkpoint.state
    refuse_other_model(folder, trained.model, trained.model.padded(state.vocab_size), config.model, skeleton.vocab_size)
    if state.layout and trained.lowrank.activation != "none":
        raise UserError(
            f"{folder} has an activation between its factors, so they are not a weight; write another folder"
        )
    scale = trained.lowrank.policy(trained.train.steps).base_scale(state.step)
    return Weights(skeleton, state.layout, TensorReader(checkpoint.folder), scale)


def _of_transformers(folder: Path, config: Config, skeleton: LanguageModel) -> Callable[[str], Tensor]:
    try:
        from ..hub.loading import TransformersWeights
    except ImportError as error:
        raise UserError(f"{folder} needs transformers ({error}); pip install 'inrank_dist[hf]'") from None
    return TransformersWeights(folder, config.model, skeleton)
