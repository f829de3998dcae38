"""Causal language models of ``transformers`` (``model.name: hf``) and their initial values."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from ..lowrank.conv1d import CONV1D
from ..lowrank.init import seed_for
from ..lowrank.kinds import linearise
from ..lowrank.layer import qualified_name
from ..lowrank.materialize import assign_parameters
from ..runtime.errors import UserError
from .huggingface_config import dtype_key, make_config, refused
from .language_model import LanguageModel
from .loss import LossHead, summed_loss
from .plan import ModelPlan
from .settings import ModelSettings
from .values import InitialValues, named_buffers, root_mean_square

logging.set_verbosity_error()

NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
"""Errors of models whose forward pass depends on values, which fake tensors do not have."""

PREFIX = "model."
"""Prefix of the names of all parameters and buffers of the ``transformers`` model."""


class HuggingFaceLM(LanguageModel):
    """A causal language model of ``transformers`` in float32, without a key-value cache.

    Parameters have their ``transformers`` names, prefixed with ``model.``. Each ``Conv1D`` is replaced by an
    ``nn.Linear``, so its weight has shape ``(out, in)`` in checkpoints, the transpose of the ``transformers`` weight.
    The output layer is replaced by a ``LossHead`` if its output is returned as the logits unchanged.

    Args:
        settings: settings with name ``hf`` and a validated ``config``.
        vocab_size: vocabulary size of the tokenizer, which replaces the one in the configuration.

    Raises:
        UserError: if ``transformers`` cannot build the model, or the model has parameters or buffers that are not
            supported.
    """

    def __init__(self, settings: ModelSettings, vocab_size: int) -> None:
        super().__init__()
        assert isinstance(settings.config, dict)
        self.settings, self.vocab_size, self.max_seq_len = settings, vocab_size, settings.max_seq_len
        self.model = build(settings.config, vocab_size)
        if settings.mask_documents and "position_ids" not in inspect.signature(self.model.forward).parameters:
            raise UserError(
                f"model.mask_documents is true, but {self.model.config.model_type} takes no position numbers; write "
                "false for model.mask_documents and model.restart_positions, or another model"
            )
        config = self.model.config
        self.num_layers = config.num_hidden_layers
        self.attention_size = _attention_size(config)
        linearise(self, [name for name, _ in self.named_modules()])
        _refuse_unknown_tensors(self, config.model_type)
        if _ends_in_head(self.model):
            head = self.model.get_output_embeddings()
            name = next(name for name, module in self.named_modules() if module is head)
            self.set_submodule(name, LossHead.of(head))

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        self.check_length(input_ids)
        head = self.model.get_output_embeddings()
        options = {"input_ids": input_ids, "use_cache": False, "return_dict": True}
        if documents := self.documents(input_ids):
            # Without an attention mask, transformers derives one from positions that start again.
            options["position_ids"] = documents.positions
        if targets is None or not isinstance(head, LossHead):
            logits: Tensor = self.model(**options).logits
            return logits if targets is None else summed_loss(logits, targets)
        head.targets = targets
        try:
            loss: Tensor = self.model(**options).logits
            return loss
        finally:
            head.targets = None

    @property
    def plan(self) -> ModelPlan:
        found = ModelPlan.infer(self)
        if found.blocks:
            return found
        for name, module in self.named_modules():  # ModelPlan.infer does not detect a single block
            if isinstance(module, nn.ModuleList) and len(module) == self.num_layers:
                return ModelPlan((f"{name}.0",), found.units, found.bottom)
        return found

    def initial_values(self, seed: int) -> InitialValues:
        return HuggingFaceValues(self, seed)


def build(mapping: dict[str, Any], vocab_size: int) -> Any:
    """Build the ``transformers`` model of a validated configuration in float32 on the default device."""
    config = make_config(mapping, vocab_size)
    try:
        model = AutoModelForCausalLM.from_config(config, **{dtype_key(config): torch.float32})
        embedding = model.get_input_embeddings()
    except Exception as error:  # models report invalid sizes with exceptions of any type
        raise refused(config.model_type, error) from None
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None  # our tokenizers have no padding token, and its row would never be trained
    return model


def _attention_size(config: Any) -> int:
    """Return the number of heads times the head dimension, or 0 without attention."""
    heads = getattr(config, "num_attention_heads", None) or 0
    try:
        width = getattr(config, "head_dim", None)
    except Exception:  # the head dimension differs between layers
        width = None
    return heads * (width or config.hidden_size // max(heads, 1))


def _refuse_unknown_tensors(model: HuggingFaceLM, model_type: str) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim > 2 and "expert" in name:
            raise UserError(
                f"model_type in model.config is {model_type!r}, whose experts are not linear layers but one tensor "
                f"({name.removeprefix(PREFIX)}); write a model without experts"
            )
    for name, module in model.named_modules():
        buffers = {id(buffer) for buffer in module.buffers(recurse=False)}
        for leaf, value in vars(module).items():
            if isinstance(value, Tensor) and id(value) not in buffers:
                raise UserError(
                    f"model_type in model.config is {model_type!r}, whose {name.removeprefix(PREFIX)}.{leaf} is a "
                    "tensor but neither parameter nor buffer, so it would get no values; write another model"
                )


@torch.no_grad()
def _ends_in_head(model: Any) -> bool:
    """Return whether the logits are the unchanged output of an ``nn.Linear``.

    Some models scale or cap the logits. This is checked in a forward pass on two fake tokens.

    Raises:
        UserError: if the forward pass fails, because the sizes do not fit each other.
    """
    head = model.get_output_embeddings()
    outputs: list[tuple[Tensor, int]] = []
    watched = model if head is None else head
    hook = watched.register_forward_hook(lambda module, inputs, output: outputs.append((output, output._version)))
    training, logger = model.training, getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True  # it would print a traceback beside the error
    try:
        with FakeTensorMode(), torch.device("cpu"):
            tensors = (*model.named_parameters(), *model.named_buffers())
            fake = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors}
            inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.int64), "use_cache": False, "return_dict": True}
            logits = functional_call(model.eval(), fake, kwargs=inputs).logits
    except NEEDS_VALUES:  # computing all logits at once is always correct
        return False
    except Exception as error:  # any operator can fail on sizes that do not fit
        said = " ".join(str(error).split())
        raise UserError(
            f"the {model.config.model_type} of model.config cannot run: {said}; write sizes that fit each other"
        ) from None
    finally:
        logger.disabled = was_disabled
        hook.remove()
        model.train(training)
    return (
        type(head) is nn.Linear and len(outputs) == 1 and outputs[0][0] is logits and outputs[0][1] == logits._version
    )


class HuggingFaceValues:
    """Initial values as in ``transformers``, with each parameter drawn independently from the seed and its name.

    ``transformers`` calls ``model._init_weights(module)`` for every module, children before parents. A call may set the
    parameters of the module and of its children. To draw one parameter, this class calls ``_init_weights`` with the
    module that owns the parameter and then with the enclosing modules. All other parameters are on ``meta``, where no
    random numbers are drawn.

    Buffers, and small parameters that ``_init_weights`` does not set, are taken from a model constructed on the CPU.
    During construction each large parameter moves to ``meta`` as soon as it is registered, so the full model is never
    in memory.

    Args:
        model: the model, which may be on ``meta``.
        seed: seed of the values.
    """

    def __init__(self, model: HuggingFaceLM, seed: int) -> None:
        self._mapping, self._vocab_size, self._seed = model.settings.config, model.vocab_size, seed
        self._constructed: Any = None
        self._small: dict[str, Tensor] = {}

    def parameter(self, name: str) -> Tensor:
        model = self._model()
        path = name.removeprefix(PREFIX)
        place, _, leaf = path.rpartition(".")
        owner = model.get_submodule(place)
        around = [".".join(place.split(".")[:length]) for length in range(place.count(".") + 1, 0, -1)] if place else []
        modules = [model.get_submodule(each) for each in around] + [model]
        for constructed in (False, True):
            value = self._drawn(name, owner, leaf, modules, constructed)
            if not value.isnan().any():
                return value.T.contiguous() if leaf == "weight" and _is_conv1d(owner) else value
        raise UserError(f"{path} gets no value from _init_weights of {type(model).__name__}; write another model_type")

    @torch.no_grad()
    def _drawn(self, name: str, owner: nn.Module, leaf: str, modules: list[nn.Module], constructed: bool) -> Tensor:
        """Return the value that ``_init_weights`` gives a parameter, with NaN in elements that are not set.

        Args:
            name: full name of the parameter.
            owner: module that owns the parameter.
            leaf: name of the parameter in ``owner``.
            modules: modules to call ``_init_weights`` with, in this order.
            constructed: whether to start from the value that the constructor sets.
        """
        model, original = self._model(), owner._parameters[leaf]
        assert original is not None
        value = nn.Parameter(torch.full(original.shape, torch.nan, device="cpu"), requires_grad=False)
        owner._parameters[leaf] = value
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(seed_for(self._seed, name))
                if constructed and name.removeprefix(PREFIX) in self._small:
                    value.copy_(self._small[name.removeprefix(PREFIX)])
                if constructed and callable(reset := getattr(owner, "reset_parameters", None)):
                    reset()
                elif constructed and leaf == "weight" and _is_conv1d(owner):
                    value.normal_(std=0.02)  # as in the constructor of Conv1D
                for module in modules:
                    model._init_weights(module)
        except NotImplementedError:  # the rule reads other parameters, which are on meta
            value.fill_(torch.nan)
        except Exception as error:
            raise UserError(
                f"_init_weights of {type(model).__name__} fails ({type(error).__name__}: {error}); write another "
                "model_type"
            ) from None
        finally:
            owner._parameters[leaf] = original
        return value.data

    def std(self, name: str) -> float:
        """Return the root mean square of the parameter."""
        return root_mean_square(self.parameter(name))

    def buffer(self, name: str) -> Tensor:
        model = self._model()
        buffers: dict[str, Tensor] = dict(named_buffers(model))
        return buffers[name.removeprefix(PREFIX)]

    def _model(self) -> Any:
        """Return the constructed model, with buffers on the CPU and parameters on ``meta``."""
        if self._constructed is None:
            assert isinstance(self._mapping, dict)
            with torch.random.fork_rng(devices=[]), torch.device("cpu"), _large_parameters_on_meta():
                torch.manual_seed(seed_for(self._seed, "constructor"))
                self._constructed = build(self._mapping, self._vocab_size)
            assign_parameters(self._constructed, self._put_away)
        return self._constructed

    def _put_away(self, name: str, parameter: nn.Parameter) -> Tensor:
        if not parameter.is_meta:
            self._small[name] = parameter.detach()
        return parameter.detach().to("meta")


SMALL = 2**20
"""Largest number of elements for which a parameter's value from the constructor is kept."""


@contextmanager
def _large_parameters_on_meta() -> Iterator[None]:
    """Move each parameter of more than ``SMALL`` elements to ``meta`` as soon as a module registers it."""
    register: Callable[..., None] = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.numel() > SMALL and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        with _NothingUnset():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _NothingUnset(TorchFunctionMode):
    """Fill the results of ``torch.empty`` with NaN, to detect values that a constructor never sets."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.empty and made.is_floating_point() and made.numel() <= SMALL:
            made.fill_(torch.nan)
        return made


def _is_conv1d(module: nn.Module) -> bool:
    return any(qualified_name(cls) == CONV1D for cls in type(module).__mro__)
