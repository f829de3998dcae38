"""Model folders that keep the factors: safetensors, JSON and the tokenizer."""

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..lowrank.convert import LayerLayout, Layout, convert
from ..lowrank.kinds import kind_of, matrix_shape
from ..lowrank.layer import Activation, set_activation, set_base_scale
from ..lowrank.materialize import assign_buffers, assign_parameters
from ..lowrank.spectrum import Factors
from ..models import LanguageModel, ModelSettings, build_model
from ..runtime.errors import UserError
from ..runtime.json_file import TooLarge, read_json
from ..runtime.safetensors_file import opened
from ..runtime.setting_types import fits
from .weights import Weights
from .writer import DTYPES, Planned, write_tensors

DESCRIPTION = "inrank.json"
"""File that describes the model: its settings, its vocabulary, and the rank of each low-rank layer."""

TENSORS = "model.safetensors"

SAME_PARAMETERS = ("init_from", "dropout", "vocab_size", "mask_documents", "restart_positions")
"""Settings of a model that change none of its parameters, or are compared by themselves."""

LARGEST_VOCABULARY = 1 << 24

LARGEST_DEPTH = 1000

LARGEST_DESCRIPTION = 64 << 20
"""Bytes. A description has about 100 bytes for each layer."""


def write_factors(
    folder: Path,
    settings: ModelSettings,
    vocab_size: int,
    layout: Layout,
    weights: Weights,
    activation: Activation,
    *,
    dtype: torch.dtype,
) -> int:
    """Write the model with its factors. At most one layer is in memory at a time.

    Args:
        folder: an existing folder.
        layout: the low-rank layers before a cut of ``weights``.
        dtype: floating dtype of all tensors.

    Returns:
        Number of parameters written.
    """
    if weights.cut is not None:
        layout = {name: _cut(layer, weights.factors(name)) for name, layer in layout.items()}
    skeleton = weights.skeleton
    description = {
        "format": 1,
        # The input of an exported model is one document.
        "model": dataclasses.asdict(dataclasses.replace(settings, mask_documents=False, restart_positions=False)),
        "vocab_size": vocab_size,
        "dtype": str(dtype).removeprefix("torch."),
        "activation": activation,
        "base_scale": weights.base_scale,
        "layers": {
            name: {"shape": list(matrix_shape(skeleton.get_submodule(name))), **dataclasses.asdict(layer)}
            for name, layer in layout.items()
        },
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    planned = []
    for name, parameter in convert(skeleton, layout).named_parameters():
        planned.append(Planned(name, tuple(parameter.shape), dtype, partial(_value, name, layout, weights)))
    write_tensors(folder, planned, max_shard_bytes=1 << 62)
    return sum(math.prod(tensor.shape) for tensor in planned)


def _cut(layer: LayerLayout, factors: Factors) -> LayerLayout:
    rank = factors.U.shape[1]
    return dataclasses.replace(layer, rank=min(layer.rank, rank), modes=rank, depth=2)


def _value(name: str, layout: Layout, weights: Weights) -> Tensor:
    layer, _, leaf = name.rpartition(".")
    if weights.cut is not None and layer in layout and leaf in ("U", "V"):
        return getattr(weights.factors(layer), leaf)
    return weights.read(name)


def read_factors(folder: Path, settings: ModelSettings, skeleton: LanguageModel) -> Weights:
    """Return the parameters of an exported model as those of its dense model, without loading them.

    Args:
        settings, skeleton: the model that they are meant for.

    Raises:
        UserError: the folder has another model, or a file is damaged.
    """
    description = _read_description(folder / DESCRIPTION)
    theirs, layout, _ = _parse(folder / DESCRIPTION, description)
    refuse_other_model(folder, theirs, description["vocab_size"], settings, skeleton.vocab_size)
    _check_layout(folder / DESCRIPTION, layout, skeleton)
    refuse_activation(folder, layout, description["activation"])
    check_tensors(folder / TENSORS, convert(skeleton, layout))

    def read(name: str) -> Tensor:
        with opened(folder / TENSORS, "export the model again", "write a folder of --format factors") as file:
            value: Tensor = file.get_tensor(name)
        return value

    return Weights(skeleton, layout, read, description["base_scale"])


def refuse_other_model(
    folder: Path, theirs: ModelSettings, their_vocab_size: int, ours: ModelSettings, vocab_size: int
) -> None:
    """Raise ``UserError`` unless both settings make the same model."""
    for field in dataclasses.fields(ours):
        found, wanted = getattr(theirs, field.name), getattr(ours, field.name)
        if field.name not in SAME_PARAMETERS and found != wanted:
            raise UserError(f"{folder} has model.{field.name} {found}, not {wanted}; write model.{field.name}: {found}")
    if their_vocab_size != vocab_size:
        raise UserError(
            f"{folder} has a vocabulary of {their_vocab_size} tokens, not {vocab_size}; write the tokenizer.path of "
            f"that model, and model.vocab_size: {their_vocab_size} if it is padded"
        )


def refuse_activation(folder: Path, layout: Layout, activation: Activation) -> None:
    """Raise ``UserError`` if the low-rank layers are not linear, so that they have no dense weight."""
    if layout and activation != "none":
        raise UserError(
            f"{folder} has an activation between its factors, so they are not a weight; write another folder"
        )


def load(folder: Path | str, device: torch.device | str = "cpu") -> LanguageModel:
    """Load a model that ``inrank export --format factors`` wrote, with its factors, in evaluation mode.

    Nothing in the folder is executed, and no tensor is read before all names, shapes and dtypes have been checked.

    Args:
        folder: the folder.
        device: device of the model.

    Returns:
        A module with ``forward(input_ids)``, from int64 ``(B, T)`` to logits ``(B, T, vocab_size)``. Its parameters
        have the dtype of the files.

    Raises:
        UserError: the folder has no such model, or a file is damaged.
    """
    folder = Path(folder)
    description = _read_description(folder / DESCRIPTION)
    settings, layout, dtype = _parse(folder / DESCRIPTION, description)
    with torch.device("meta"):
        skeleton = build_model(settings, description["vocab_size"])
    _check_layout(folder / DESCRIPTION, layout, skeleton)
    model = convert(skeleton, layout)
    _fill(model, folder / TENSORS, dtype, torch.device(device))
    assign_buffers(model, skeleton.initial_values(0).buffer, torch.device(device))
    set_activation(model, description["activation"])
    set_base_scale(model, description["base_scale"])
    return model.eval()


def _check_layout(path: Path, layout: Layout, skeleton: nn.Module) -> None:
    """Raise ``UserError`` if a model cannot have these low-rank layers."""
    modules = dict(skeleton.named_modules())
    for name, layer in layout.items():
        module = modules.get(name)
        if module is None or kind_of(module) is None or not layer.rank <= layer.modes <= min(matrix_shape(module)):
            raise UserError(f"{path} has a rank of {name} that its model cannot have; export it again")


def check_tensors(path: Path, model: nn.Module) -> None:
    """Raise ``UserError`` unless a file holds exactly the parameters of a model, which may be on ``meta``."""
    wanted = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    with opened(path, "export the model again", "write a folder of --format factors") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{path} holds {name} as {found.get(name, 'nothing')}, where {DESCRIPTION} makes "
                f"{wanted.get(name, 'nothing')}; export the model again"
            )


def _fill(model: nn.Module, path: Path, dtype: torch.dtype, device: torch.device) -> None:
    check_tensors(path, model)
    with safe_open(path, "pt", device=str(device)) as file:
        assign_parameters(model, lambda name, _: file.get_tensor(name))
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtype:
            raise UserError(f"{path} holds {name} as {parameter.dtype}, not {dtype}; export the model again")


def _read_description(path: Path) -> dict[str, Any]:
    advice = "write a folder that inrank export --format factors made"
    try:
        description = read_json(path, LARGEST_DESCRIPTION)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {advice}") from None
    except TooLarge:
        raise UserError(f"{path} is larger than {LARGEST_DESCRIPTION >> 20} MiB; {advice}") from None
    except ValueError:
        raise UserError(f"{path} is not JSON; {advice}") from None
    return description if isinstance(description, dict) else {}


def _parse(path: Path, description: Mapping[str, Any]) -> tuple[ModelSettings, Layout, torch.dtype]:
    try:
        if description["format"] != 1:
            raise ValueError(f"format {description['format']!r}")
        settings = _settings(description["model"])
        layout = {
            name: LayerLayout(
                _whole(layer["rank"]),
                _whole(layer["modes"]),
                layer["base"] is True,
                _depth(layer.get("depth", 2)),
                layer.get("fixed_outer") is True,
            )
            for name, layer in description["layers"].items()
        }
        if _whole(description["vocab_size"]) > LARGEST_VOCABULARY:
            raise ValueError(f"vocab_size {description['vocab_size']}")
        if description["activation"] not in get_args(Activation):
            raise ValueError(f"activation {description['activation']!r}")
        if type(description["base_scale"]) not in (int, float) or not math.isfinite(description["base_scale"]):
            raise ValueError(f"base_scale {description['base_scale']!r}")
        dtype = DTYPES[description["dtype"]]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); export the model again") from None
    return settings, layout, dtype


def _settings(values: Mapping[str, Any]) -> ModelSettings:
    types = get_type_hints(ModelSettings, include_extras=True)
    for name, value in values.items():
        if name in types and not fits(value, types[name]):
            raise ValueError(f"model.{name} {value!r}")
    return ModelSettings(**values)


def _depth(value: Any) -> int:
    if not 2 <= _whole(value) <= LARGEST_DEPTH:
        raise ValueError(f"depth {value!r}")
    return int(value)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is not a whole number of at least 1")
    return value
