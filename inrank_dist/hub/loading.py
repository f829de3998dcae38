"""Weights of a dense ``transformers`` folder as initial values of our models."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..lowrank.kinds import kind_of
from ..models import LanguageModel, ModelSettings
from ..models.huggingface_config import LAYER_CROSSING, OF_A_FILE, make_config
from ..runtime.errors import UserError
from ..runtime.json_file import read_json
from ..runtime.safetensors_file import opened
from .architectures import module_names
from .transformers_model import build_target

INDEX = "model.safetensors.index.json"
LARGEST_JSON = 64 << 20
"""Bytes of a config.json or an index."""

IGNORED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Ends of the names of constant buffers that older versions of ``transformers`` saved."""

WITHOUT_EFFECT = {
    *OF_A_FILE, "architectures", "attn_pdrop", "embd_pdrop", "initializer_range", "pretraining_tp", "attention_dropout",
    "resid_pdrop", "id2label", "label2id", "num_labels", "problem_type",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "task_specific_params", "max_position_embeddings", "n_ctx", "name_or_path",
}  # fmt: skip
"""Keys of a configuration that do not change what a model computes."""


class TransformersWeights:
    """Parameters of a ``transformers`` folder under our names, read from safetensors one at a time.

    Nothing in the folder is executed. Names and shapes are checked before any tensor is read.

    Args:
        folder: the folder, with ``config.json`` and safetensors files.
        settings: settings of our model.
        skeleton: our dense model on ``meta``.

    Raises:
        UserError: the folder holds another model than the settings describe, or a file cannot be used.
    """

    def __init__(self, folder: Path, settings: ModelSettings, skeleton: LanguageModel) -> None:
        self._folder, self._target = folder, build_target(settings, skeleton.vocab_size)
        _compare_configs(folder, self._target.config, settings.layer_crossing)
        self._files = _files(folder)
        self._places: dict[str, tuple[str, int, int]] = {}
        self._locate(settings, skeleton)

    def __call__(self, name: str) -> Tensor:
        """Return a parameter of our dense model in its dtype in the files."""
        theirs, first, end = self._places[name]
        path, _, leaf = theirs.rpartition(".")
        module = self._target.get_submodule(path)
        with opened(self._files[self._stored(theirs)], "write a complete folder", "write a complete folder") as file:
            value: Tensor = file.get_tensor(self._stored(theirs))
        kind = kind_of(module)
        matrix = kind.matrix(value) if kind is not None and leaf == "weight" else value
        return matrix[first:end].contiguous()

    def _stored(self, name: str) -> str:
        """Return the name of a parameter in the files, which may lack the prefix of the base model."""
        return name if name in self._files else name.removeprefix(f"{self._target.base_model_prefix}.")

    def _locate(self, settings: ModelSettings, skeleton: LanguageModel) -> None:
        """Find each of our parameters in the files and compare the shapes."""
        shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
        known = set()
        for name, parameter in self._target.named_parameters():
            stored = self._stored(name)
            known.add(stored)
            if stored not in self._files:
                raise UserError(
                    f"{self._folder} holds no {name}, which its config.json describes; write a complete folder"
                )
            found = _shape(self._files[stored], stored)
            if found != tuple(parameter.shape):
                raise UserError(
                    f"{self._folder} holds {stored} as {list(found)}, where the settings make {list(parameter.shape)}; "
                    "write the sizes and tokenizer.path of that model, and model.vocab_size if its vocabulary is padded"
                )
            path, _, leaf = name.rpartition(".")
            first = 0
            for ours in module_names(settings, path):
                rows = shapes[f"{ours}.{leaf}"][0]
                self._places[f"{ours}.{leaf}"] = (name, first, first + rows)
                first += rows
        tied = {self._stored(name) for name, _ in self._target.named_parameters(remove_duplicate=False)}
        surplus = sorted(name for name in self._files.keys() - known - tied if not name.endswith(IGNORED))
        if surplus:
            raise UserError(
                f"{self._folder} holds {surplus[0]}, which the settings do not make; write those of its model"
            )


def _compare_configs(folder: Path, ours: Any, layer_crossing: bool) -> None:
    """Raise ``UserError`` unless the folder's configuration describes the same model."""
    written = _read_object(folder / "config.json")
    found, wanted = written.get("model_type"), ours.model_type + LAYER_CROSSING * layer_crossing
    if found != wanted:
        plain = str(found).removesuffix(LAYER_CROSSING)
        advice = f"model.name: hf and model.config: {folder}"
        if found != plain:
            advice = f"model.name: {plain} and model.layer_crossing: true"
        elif found == ours.model_type:
            advice = "model.layer_crossing: false"
        raise UserError(f"{folder} holds a {found}, where the settings make a {wanted}; write {advice}")
    known = {key: value for key, value in written.items() if key not in WITHOUT_EFFECT}
    theirs = make_config({**known, "model_type": ours.model_type}, 1).to_dict()
    mine = ours.to_dict()
    for each in (theirs, mine):  # what GPT-2 takes for a width that is not written
        if "n_inner" in each and each["n_inner"] is None:
            each["n_inner"] = 4 * each["n_embd"]
    for key in sorted(theirs.keys() & mine.keys() - WITHOUT_EFFECT - {"vocab_size"}):
        if theirs[key] != mine[key]:
            raise UserError(
                f"{folder / 'config.json'} has {key} {theirs[key]!r}, where the settings make {mine[key]!r}; write the "
                f"settings of that model, or model.name: hf and model.config: {folder}"
            )


def _files(folder: Path) -> dict[str, Path]:
    """Return the file of each stored tensor."""
    index = folder / INDEX
    if index.exists() and not (folder / "model.safetensors").exists():
        entries = _read_object(index).get("weight_map")
        if not isinstance(entries, dict) or not entries:
            raise UserError(f"{index} has no weight_map; write a complete folder")
        names = {str(name): str(file) for name, file in entries.items()}
        for file in names.values():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise UserError(f"{index} names the file {file!r}, which is not a safetensors file of this folder")
        files = {folder / file for file in names.values()}
    else:
        files = {folder / "model.safetensors"}
        if not (folder / "model.safetensors").exists():
            pickled = next(iter(sorted(folder.glob("*.bin"))), None)
            why = f"only {pickled.name}, a pickle that could execute code" if pickled else "no model.safetensors"
            raise UserError(f"{folder} holds {why}; write a folder with weights in safetensors")
    return {name: file for file in sorted(files) for name in _names(file)}


def _names(path: Path) -> list[str]:
    with opened(path, "write a complete folder", "write a complete folder") as file:
        return list(file.keys())


def _shape(file: Path, name: str) -> tuple[int, ...]:
    with safe_open(file, "pt") as tensors:
        part = tensors.get_slice(name)
        if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise UserError(f"{file} holds {name} as {part.get_dtype()}; write a folder with floating-point weights")
        return tuple(part.get_shape())


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of bounded size.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        content = read_json(path, LARGEST_JSON)
        if isinstance(content, dict):
            return content
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); write a folder of transformers") from None
    except ValueError:
        pass
    raise UserError(f"{path} is not a JSON object of at most {LARGEST_JSON >> 20} MiB; write a folder of transformers")
