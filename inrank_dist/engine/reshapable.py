"""A model with low-rank layers that can change their shapes during training, together with its optimizer."""

import copy
import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..lowrank.convert import Layout, convert
from ..lowrank.cores import map_core
from ..lowrank.division import Processes
from ..lowrank.event import RankEvent, map_factors
from ..lowrank.layer import core_names, set_base_scale
from ..lowrank.materialize import assign_buffers, assign_parameters, clean
from ..lowrank.spectrum import identity_rows
from ..models.values import named_buffers
from ..optim.moments import MomentRule, map_moments, moments_of_right_factor, plain_state
from ..runtime.errors import UserError
from .model_rows import ModelRows
from .placement import RowPlacement, placement_of

Values = Callable[[str], Tensor]
"""Function of a parameter's or buffer's name. It returns the unsharded initial value on the CPU, which is equal on all
processes."""

Rows = Callable[[str, nn.Parameter], Tensor]
"""Function of a parameter's name and the parameter on ``meta``. It returns this process's rows of the value, on the
device."""


class ReshapableModel(ModelRows):
    """Model and optimizer, unsharded or sharded by rows, whose low-rank layers can change shape.

    FSDP2, optimizers and DeepSpeed silently ignore a replaced parameter, so ``reshape`` rebuilds everything. It
    converts the dense skeleton on ``meta`` to the new layout, shards the result, assigns the old tensors, and creates a
    new optimizer with the old state. Tensors and state of layers whose rank changes are mapped. Each process maps only
    its own rows.

    Args:
        skeleton: dense model on ``meta``. It is not modified.
        layout: the low-rank layers at initialisation.
        values: initial values of the parameters. None: zeros, to be overwritten.
        buffers: initial values of the buffers.
        device: device of the model.
        processes: all processes of the job.
        moments_on_event: how optimizer state changes at a rank event, see ``map_moments``.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        layout: Layout,
        values: Values | None,
        buffers: Values,
        *,
        device: torch.device,
        processes: Processes,
        moments_on_event: MomentRule = "transport",
    ) -> None:
        self.skeleton, self.device, self.processes = skeleton, device, processes
        self.moments_on_event = moments_on_event
        self._base_scale = 1.0

        def initial(name: str, parameter: nn.Parameter) -> Tensor:
            assert values is not None
            whole = values(name)
            # Copy the rows, because a view would keep the unsharded tensor alive.
            rows = whole[slice(*self._placements[name].rows(parameter.shape[0]))] if parameter.ndim else whole
            return rows.to(device, parameter.dtype, copy=True).contiguous()

        self._build(layout, self._zeros if values is None else initial, buffers)

    # Overridden by subclasses.

    def _prepare(self, module: nn.Module, layout: Layout) -> None:
        """Configure the converted model on ``meta`` in place, before it is sharded."""

    def _parallelize(self, module: nn.Module) -> None:
        """Shard the model on ``meta`` in place."""

    def _wrap(self, module: nn.Module) -> nn.Module:
        """Return the callable model, after its parameters are assigned. The default is the model itself."""
        return module

    def _make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        raise NotImplementedError

    # Building.

    def _build(self, layout: Layout, rows: Rows, buffers: Values) -> None:
        module = convert(self.skeleton, layout)
        self._prepare(module, layout)
        self._parallelize(module)
        self._placements = self._find_placements(module)
        self._assign(module, rows)
        assign_buffers(module, buffers, self.device)
        set_base_scale(module, self._base_scale)
        self.layout, self.module = dict(layout), module
        self.optimizer = self._make_optimizer(module)
        self.model = self._wrap(module)

    def _find_placements(self, module: nn.Module) -> dict[str, RowPlacement]:
        found = {
            clean(name): placement_of(clean(name), parameter, self.processes.rank, self.processes.count)
            for name, parameter in module.named_parameters(remove_duplicate=False)
        }
        for name, placement in found.items():
            layer, _, leaf = name.rpartition(".")
            if leaf == "U" and f"{layer}.V" in found and found[f"{layer}.V"] != placement:
                raise UserError(f"the factors U and V of {layer} are sharded differently; write one sharding for both")
        return found

    def _assign(self, module: nn.Module, rows: Rows) -> None:
        """Assign the parameters of a module on ``meta``."""

        def held(name: str, parameter: nn.Parameter) -> Tensor:
            return self._placements[name].wrap(rows(name, parameter), parameter.shape)

        assign_parameters(module, held)

    def _zeros(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Return zeros in the shape of this process's rows of a parameter."""
        shape = list(parameter.shape)
        if shape:
            first, end = self._placements[name].rows(shape[0])
            shape[0] = end - first
        return torch.zeros(shape, dtype=parameter.dtype, device=self.device)

    def release(self) -> None:
        """Free the model and its optimizer. The object is unusable until ``_build`` is called again."""
        del self.module, self.model, self.optimizer
        gc.collect()  # models contain reference cycles; free their memory now

    def reshape(self, layout: Layout, events: Mapping[str, RankEvent], directions: Callable[[str], Tensor]) -> None:
        """Change the shapes of layers.

        Rows are mapped without communication, with two exceptions. Dense layers that are factorised need one all-reduce
        of ``8 in R`` bytes per moment if their moments are transported. Each core of a deep layer needs one of
        ``8 R^2`` bytes per moment.

        Args:
            layout: new layout of all low-rank layers.
            events: events of the layers to change. A dense layer that is factorised is mapped as if its weight were
                ``U`` and the identity were ``V``.
            directions: function of a layer's name that returns its unsharded directions ``Z: (in, F)``. It is called
                only for events with fresh modes.
        """
        tensors, moments, extras = self._rows()
        buffers = dict(named_buffers(self.module))
        for layer, event in events.items():
            self._map_layer(layer, event, directions, tensors, moments, extras)
        self.release()
        self._build(layout, lambda name, _: tensors[name], lambda name: buffers[name])
        for name, parameter in self.parameters().items():
            self._set_state(name, parameter, moments[name], extras[name])
        self.check()

    def _map_layer(
        self,
        layer: str,
        event: RankEvent,
        directions: Callable[[str], Tensor],
        tensors: dict[str, Tensor],
        moments: dict[str, dict[str, Tensor]],
        extras: dict[str, dict[str, Any]],
    ) -> None:
        """Apply an event to this process's rows of a layer's factors and moments, and update the dictionaries."""
        U_name, V_name = f"{layer}.U", f"{layer}.V"
        rule, of_weight = self.moments_on_event, None
        held = self.placement(layer)
        in_features = self.shape(layer)[1]
        if layer not in self.layout:
            of_weight = {key: self._matrix(layer, each) for key, each in moments.pop(f"{layer}.weight").items()}
            tensors[U_name] = self._matrix(layer, tensors.pop(f"{layer}.weight"))
            tensors[V_name] = identity_rows(*held.rows(in_features), in_features, self.device)
            moments |= {U_name: of_weight, V_name: {}}
            # Copy the state, because optimizers increment ``step`` in place and would do so twice in a shared tensor.
            extras[U_name] = extras.pop(f"{layer}.weight")
            extras[V_name] = copy.deepcopy(extras[U_name])
            rule = "reset" if rule == "slice" else rule  # the columns of a weight are not modes
        U, V = tensors[U_name], tensors[V_name]
        Z = directions(layer)[slice(*held.rows(in_features))].to(self.device) if event.fresh else None
        factors = map_factors(event, U, V, Z)
        tensors[U_name], tensors[V_name] = factors.U, factors.V
        step, betas = self._step_and_betas(extras[U_name])
        for factor, name in (("U", U_name), ("V", V_name)):
            if moments[name]:
                moments[name] = map_moments(event, factor, moments[name], step=step, betas=betas, rule=rule)
        self._map_cores(layer, event, tensors, moments, extras)
        if of_weight:
            moments[V_name] = {name: factors.V.new_zeros(len(factors.V), event.modes) for name in of_weight}
            if rule == "transport":
                out_features = self.shape(layer)[0]
                whole = moments_of_right_factor(
                    {name: held.counted(moment, out_features) for name, moment in of_weight.items()},
                    held.counted(factors.U, out_features),
                    self.processes.sum,
                    step=step,
                    betas=betas,
                )
                rows = slice(*held.rows(in_features))
                moments[V_name] = {name: moment[rows].clone() for name, moment in whole.items()}

    def _map_cores(
        self,
        layer: str,
        event: RankEvent,
        tensors: dict[str, Tensor],
        moments: dict[str, dict[str, Tensor]],
        extras: Mapping[str, dict[str, Any]],
    ) -> None:
        """Apply an event to this process's rows of a layer's cores and their moments, which are gathered for it."""
        if event.cores is None:
            return
        for index, core in enumerate(core_names(self.layout[layer].depth), start=1):
            name = f"{layer}.{core}"
            like, rows = tensors[name], slice(*self._placements[name].rows(event.modes))
            whole = map_core(event.cores, index, event.fresh)[rows]
            tensors[name] = whole.to(like.device, like.dtype).contiguous()
            if not moments[name]:
                continue
            step, betas = self._step_and_betas(extras[name])
            gathered = self._gathered((name, moment) for moment in moments[name].values())
            whole_moments = {key: each.to(like.dtype) for key, each in zip(moments[name], gathered, strict=True)}
            mapped = map_moments(event, core, whole_moments, step=step, betas=betas, rule=self.moments_on_event)
            moments[name] = {key: each[rows].clone() for key, each in mapped.items()}

    def _step_and_betas(self, extras: Mapping[str, Any]) -> tuple[float, tuple[float, float]]:
        """Return the number of optimizer steps taken and Adam's betas, for bias correction."""
        betas = self.optimizer.param_groups[0].get("betas", (0.9, 0.999))
        return float(extras.get("step", 0)), (float(betas[0]), float(betas[1]))

    def _rows(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, dict[str, Any]]]:
        """Return this process's rows of all parameters and of their moments, and the rest of the optimizer state."""
        parameters = self.parameters()
        tensors = {name: self._local(parameter) for name, parameter in parameters.items()}
        moments = {name: self._moments(parameter) for name, parameter in parameters.items()}
        extras = {name: plain_state(self.optimizer, parameter) for name, parameter in parameters.items()}
        return tensors, moments, extras

    def set_base_scale(self, scale: float) -> None:
        """Set the coefficient ``a`` of the dense base in all layers ``a * W0 + U V^T``."""
        if scale != self._base_scale:
            self._base_scale = scale
            set_base_scale(self.module, scale)
