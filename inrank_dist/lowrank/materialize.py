"""Values for a converted model on ``meta``."""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from .layer import LowRankLayer

Model = TypeVar("Model", bound=nn.Module)

WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
"""What torch's activation checkpointing and compiler put into the names of parameters."""


def clean(name: str) -> str:
    """The name of a parameter or buffer without what wrappers put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def assign_parameters(model: nn.Module, value: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Replace the parameters of a model, in place; tied ones stay one object.

    Args:
        value: asked once for each parameter, by its first name.
    """
    made: dict[int, nn.Parameter] = {}
    for prefix, owner in model.named_modules():
        state = {}
        for leaf, parameter in owner.named_parameters(recurse=False):
            if id(parameter) not in made:
                new = value(clean(f"{prefix}.{leaf}" if prefix else leaf), parameter)
                made[id(parameter)] = nn.Parameter(new, requires_grad=parameter.requires_grad)
            state[leaf] = made[id(parameter)]
        if state:  # by this call FSDP2 learns of new parameters
            owner.load_state_dict(state, assign=True, strict=False)


def assign_buffers(model: nn.Module, value: Callable[[str], Tensor], device: torch.device) -> None:
    """Replace the buffers of a model, in place: those of low-rank layers by their start, the others by ``value``.

    Args:
        value: name -> buffer on any device; copied.
    """
    for prefix, owner in model.named_modules():
        for leaf, buffer in list(owner.named_buffers(recurse=False)):
            if isinstance(owner, LowRankLayer):
                new = torch.ones_like(buffer, device=device)
            else:
                new = value(clean(f"{prefix}.{leaf}" if prefix else leaf)).to(device, copy=True)
            owner._buffers[leaf] = new  # register_buffer would change whether it is saved


def materialize(model: nn.Module, buffers: Callable[[str], Tensor], device: torch.device) -> None:
    """Give a model on ``meta`` uninitialised parameters and initialised buffers on a device, in place."""
    assign_parameters(model, lambda _, parameter: torch.empty_like(parameter, device=device))
    assign_buffers(model, buffers, device)


def copied_to(model: Model, device: torch.device | str) -> Model:
    """A copy of a model with its parameters and buffers on a device, ``meta`` included; tied ones stay tied."""
    copies: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        new = tensor.detach().to(device, copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        copies[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new
    return copy.deepcopy(model, copies)
