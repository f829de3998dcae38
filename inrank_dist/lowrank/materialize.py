"""Replacement of the parameters and buffers of a model, for example of one on ``meta``."""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from .layer import LowRankLayer

Model = TypeVar("Model", bound=nn.Module)

WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
"""Prefixes that activation checkpointing and ``torch.compile`` insert into names of parameters."""


def clean(name: str) -> str:
    """Return the name of a parameter or buffer without the prefixes of wrappers."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def assign_parameters(model: nn.Module, value: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Replace the parameters of a model in place. Tied parameters remain tied.

    Args:
        value: ``value(name, parameter)`` returns the new tensor. It is called once per parameter, with its first name.
    """
    made: dict[int, nn.Parameter] = {}
    for prefix, owner in model.named_modules():
        state = {}
        for leaf, parameter in owner.named_parameters(recurse=False):
            if id(parameter) not in made:
                new = value(clean(f"{prefix}.{leaf}" if prefix else leaf), parameter)
                made[id(parameter)] = nn.Parameter(new, requires_grad=parameter.requires_grad)
            state[leaf] = made[id(parameter)]
        if state:  # FSDP2 notices new parameters only in load_state_dict
            owner.load_state_dict(state, assign=True, strict=False)


def assign_buffers(model: nn.Module, value: Callable[[str], Tensor], device: torch.device) -> None:
    """Replace the buffers of a model in place: ``base_scale`` of low-rank layers by 1, all others by ``value``.

    Args:
        value: name -> buffer on any device, which is copied.
        device: device of the new buffers.
    """
    for prefix, owner in model.named_modules():
        for leaf, buffer in list(owner.named_buffers(recurse=False)):
            if isinstance(owner, LowRankLayer):
                new = torch.ones_like(buffer, device=device)
            else:
                new = value(clean(f"{prefix}.{leaf}" if prefix else leaf)).to(device, copy=True)
            owner._buffers[leaf] = new  # register_buffer would change whether it is saved


def materialize(model: nn.Module, buffers: Callable[[str], Tensor], device: torch.device) -> None:
    """Allocate the parameters of a model on ``meta``, uninitialised, and set its buffers, in place.

    Args:
        buffers: name -> buffer on any device, which is copied.
        device: device of the new tensors.
    """
    assign_parameters(model, lambda _, parameter: torch.empty_like(parameter, device=device))
    assign_buffers(model, buffers, device)


def copied_to(model: Model, device: torch.device | str) -> Model:
    """Return a copy of a model on a device, which may be ``meta``. Tied tensors remain tied."""
    copies: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        new = tensor.detach().to(device, copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        copies[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new
    return copy.deepcopy(model, copies)
