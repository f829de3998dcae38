"""Assignment of parameters to update rules, and construction of the optimizer."""

from collections.abc import Callable, Iterable, Mapping, Set
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ..lowrank.kinds import kind_of
from ..lowrank.layer import LowRankLayer, is_factor
from ..runtime.errors import UserError
from .matrices import HeldRows, MatrixOptimizer, Pair
from .settings import OptimizerSettings

Role = Literal["plain", "dense", "factor"]
"""How a parameter is updated: elementwise (``plain``), as a matrix (``dense``), or as one of a pair of factors
(``factor``)."""


def parameter_roles(model: nn.Module, blocks: Iterable[nn.Module], settings: OptimizerSettings) -> dict[str, Role]:
    """Return the role of each parameter that requires a gradient.

    Args:
        model: the model, with low-rank layers or without.
        blocks: modules whose dense layers are trained as matrices if the layer has a kind (``lowrank.kinds``). Weights
            outside of them (embeddings, the head) are ``plain``.
        settings: the optimizer. Every role is ``plain`` unless it orthogonalises updates.

    Raises:
        UserError: if the optimizer orthogonalises updates and a layer in ``blocks`` stores its weight transposed.
    """
    roles: dict[int, Role] = {}
    if settings.orthogonalises:
        inside = {id(module) for block in blocks for module in block.modules()}
        for name, module in model.named_modules():
            if isinstance(module, LowRankLayer):
                roles |= {id(module.U): "factor", id(module.V): "factor"}
            elif id(module) in inside and (kind := kind_of(module)):
                if kind.transposed:
                    raise UserError(
                        f"{name} is a {type(module).__name__}, whose weight is stored as (in, out), and optimizer.name "
                        f"{settings.name} needs (out, in); write optimizer.name: adamw"
                    )
                roles[id(module.weight)] = "dense"
    return {name: roles.get(id(p), "plain") for name, p in model.named_parameters() if p.requires_grad}


def decayed_parameters(model: nn.Module, *, factors: bool) -> set[str]:
    """Return the names of the parameters with weight decay: those with two or more dimensions, except embeddings.

    Args:
        model: the model.
        factors: whether factors are included. False if they have their own decay (``lowrank.frobenius_decay``).
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2
        and id(parameter) not in embeddings
        and (factors or not is_factor(name.rpartition(".")[2]))
    }


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    roles: Mapping[str, Role],
    decayed: Set[str],
    settings: OptimizerSettings,
    *,
    rows: HeldRows,
    elementwise: Callable[..., torch.optim.Optimizer] | None = None,
    matrix_dtype: torch.dtype = torch.bfloat16,
    lr_scales: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer for the parameters in ``roles``, in groups with and without weight decay.

    Groups of parameters in ``lr_scales`` have a key ``lr_scale``.

    Args:
        parameters: all parameters of the model, by name.
        roles: result of ``parameter_roles``.
        decayed: names of the parameters with weight decay.
        settings: the optimizer and its hyperparameters.
        rows: how parameters are sharded, for orthogonalised updates.
        elementwise: constructor of the elementwise optimizer, if it is not the one of ``settings.entry``.
        matrix_dtype: dtype in which dense matrices are orthogonalised.
        lr_scales: name -> learning rate as a multiple of that of the other parameters.
    """
    scales = lr_scales or {}

    def groups(wanted: Role) -> list[dict[str, Any]]:
        both: list[dict[str, Any]] = []
        of_role = [name for name in parameters if roles.get(name) == wanted]
        for scale in sorted({scales.get(name, 1.0) for name in of_role}, key=lambda scale: (scale != 1, scale)):
            names = [name for name in of_role if scales.get(name, 1.0) == scale]
            decays = [parameters[name] for name in names if name in decayed]
            plain = [parameters[name] for name in names if name not in decayed]
            scaled = {} if scale == 1 else {"lr_scale": scale}
            both.append({"params": decays, "weight_decay": settings.weight_decay, **scaled})
            both.append({"params": plain, "weight_decay": 0.0, **scaled})
        return [group for group in both if group["params"]]

    entry = settings.entry
    if settings.orthogonalises:
        layers = [name.rpartition(".")[0] for name in parameters if roles.get(name) == "factor" and name.endswith(".U")]
        pairs: dict[float, list[Pair]] = {}
        for layer in layers:
            decay = settings.weight_decay if f"{layer}.U" in decayed else 0.0
            pairs.setdefault(decay, []).append(Pair(parameters[f"{layer}.U"], parameters[f"{layer}.V"]))
        return MatrixOptimizer(
            groups("plain"),
            groups("dense"),
            [(layers, decay) for decay, layers in pairs.items()],
            rows,
            maps=entry.maps,
            lr=settings.lr,
            matrix_lr=settings.matrix_lr,
            momentum=settings.momentum,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            dtype=matrix_dtype,
        )
    make = elementwise or partial(entry.elementwise, **entry.native_arguments)
    return make(groups("plain"), **entry.arguments(settings))
