"""A model with low-rank layers and its optimizer, whole or sharded by rows, whose layers can change shape."""

import gc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..lowrank.convert import Layout, convert
from ..lowrank.division import Processes
from ..lowrank.event import RankEvent, map_factors
from ..lowrank.kinds import kind_of, matrix_shape
from ..lowrank.layer import set_base_scale
from ..lowrank.materialize import assign_buffers, assign_parameters, clean
from ..lowrank.spectrum import DenseRows, Factors, identity_rows
from ..models.plan import named_buffers
from ..optim.moments import MomentRule, map_moments, moments_of_right_factor, plain_state
from .placement import RowPlacement, local_rows, placement_of

Values = Callable[[str], Tensor]
"""Parameter or buffer name -> its whole start value on the CPU, the same on every process."""

Rows = Callable[[str, nn.Parameter], Tensor]
"""Name and parameter on ``meta`` -> this process's rows of its value, on the device."""


class ShardedModel:
    """Holds a model and its optimizer and changes the shapes of its low-rank layers.

    Reshaping is rebuilding: FSDP2, optimizers and DeepSpeed silently ignore a parameter that is replaced. So the model
    is converted again from the dense skeleton on ``meta`` with the new layout, sharded again, given the old tensors
    (mapped where the rank changed), and gets a new optimizer with the old state (mapped likewise). Only the rows that
    this process holds are touched.

    Attributes:
        module: the model; its parameters are those of the optimizer.
        model: what is called; ``module`` itself or a wrapper of it such as DistributedDataParallel.
        optimizer: of ``module``.
        layout: low-rank layer -> its rank and number of modes.
        processes: all processes.

    Args:
        skeleton: dense model on ``meta``; it is never changed.
        layout: the low-rank layers at initialisation.
        values: initial values of parameters; None: zeros, to be read into.
        buffers: initial values of buffers.
        device: of the model.
        processes: all processes of the job.
        moments_on_event: what becomes of optimizer state at a rank event.
    """

    module: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    layout: Layout

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
            first, end = self._placements[name].rows(parameter.shape[0]) if parameter.ndim else (0, 1)
            if values is None:
                shape = (end - first, *parameter.shape[1:]) if parameter.ndim else ()
                return torch.zeros(shape, dtype=parameter.dtype, device=device)
            whole = values(name)
            # A copy of the rows: a view would keep the whole tensor alive.
            rows = whole[first:end] if parameter.ndim else whole
            return rows.to(device, parameter.dtype, copy=True).contiguous()

        self._build(layout, initial, buffers)

    # What a subclass defines: how the model is sharded, called and trained.

    def _prepare(self, module: nn.Module, layout: Layout) -> None:
        """Configure the converted model on ``meta``, in place, before it is sharded."""

    def _parallelize(self, module: nn.Module) -> None:
        """Shard the model on ``meta``, in place."""

    def _wrap(self, module: nn.Module) -> nn.Module:
        """What is called in place of the model, which has its values by now."""
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
        return {
            clean(name): placement_of(clean(name), parameter, self.processes.rank, self.processes.count)
            for name, parameter in module.named_parameters(remove_duplicate=False)
        }

    def _assign(self, module: nn.Module, rows: Rows) -> None:
        """Give a module on ``meta`` its parameters."""

        def held(name: str, parameter: nn.Parameter) -> Tensor:
            return self._placements[name].wrap(rows(name, parameter), parameter.shape)

        assign_parameters(module, held)

    def release(self) -> None:
        """Let go of the model and its optimizer; without a build there is no more use for this object."""
        del self.module, self.model, self.optimizer
        gc.collect()  # a model is a web of cycles; its memory is wanted at once

    def reshape(self, layout: Layout, events: Mapping[str, RankEvent], directions: Callable[[str], Tensor]) -> None:
        """Change the shapes of layers; only this process's rows are touched.

        Nothing is sent, unless dense layers become factors: then one all-reduce a layer, of ``8 in R`` bytes for each
        of its moments.

        Args:
            layout: all low-rank layers as they shall be.
            events: the maps of those whose rank changes, and of dense layers that become factors, whose weight is
                taken for ``U`` and the identity for ``V``.
            directions: layer -> its whole ``Z: (in, F)``, asked only where there are fresh modes.
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
        """Apply one event to the rows of a layer's factors and of their moments."""
        U_name, V_name = f"{layer}.U", f"{layer}.V"
        rule, of_weight = self.moments_on_event, None
        held = self.placement(layer)
        in_features = self.shape(layer)[1]
        if layer not in self.layout:
            of_weight = {key: self._matrix(layer, each) for key, each in moments.pop(f"{layer}.weight").items()}
            tensors[U_name] = self._matrix(layer, tensors.pop(f"{layer}.weight"))
            tensors[V_name] = identity_rows(*held.rows(in_features), in_features, self.device)
            moments |= {U_name: of_weight, V_name: {}}
            extras[U_name] = extras[V_name] = extras.pop(f"{layer}.weight")
            rule = "reset" if rule == "slice" else rule  # the columns of a weight are no modes
        U, V = tensors[U_name], tensors[V_name]
        Z = directions(layer)[slice(*held.rows(in_features))].to(self.device) if event.fresh else None
        factors = map_factors(event, U, V, Z)
        tensors[U_name], tensors[V_name] = factors.U, factors.V
        step, betas = self._step_and_betas(extras[U_name])
        for factor, name in (("U", U_name), ("V", V_name)):
            if moments[name]:
                moments[name] = map_moments(event, factor, moments[name], step=step, betas=betas, rule=rule)
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

    def _step_and_betas(self, extras: Mapping[str, Any]) -> tuple[float, tuple[float, float]]:
        """Optimizer steps so far and Adam's decay rates, by which its moments are corrected."""
        betas = self.optimizer.param_groups[0].get("betas", (0.9, 0.999))
        return float(extras.get("step", 0)), (float(betas[0]), float(betas[1]))

    def _rows(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, dict[str, Any]]]:
        """This process's rows of every parameter and of its moments, and the rest of its optimizer state."""
        parameters = self.parameters()
        tensors = {name: self._local(parameter) for name, parameter in parameters.items()}
        moments = {name: self._moments(parameter) for name, parameter in parameters.items()}
        extras = {name: plain_state(self.optimizer, parameter) for name, parameter in parameters.items()}
        return tensors, moments, extras

    def check(self) -> None:
        """Assert that the optimizer's parameters are the model's, every one of them."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        present = {id(p) for p in self.parameters().values() if p.requires_grad}
        assert held == present, "the optimizer holds other parameters than the model"

    # Parameters and optimizer state.

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters as they are held between steps, by name; tied ones once."""
        # FSDP2 keeps the root group gathered after a forward pass; its parameters are then plain tensors that the
        # optimizer does not know.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return {clean(name): parameter for name, parameter in self.module.named_parameters()}

    def _local(self, tensor: Tensor) -> Tensor:
        """This process's rows of a parameter, gradient or moment; shares memory with it."""
        return local_rows(tensor)

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """This process's rows of everything of a parameter's shape that the optimizer remembers of it."""
        return {name: self._moment(parameter, name) for name in self._moment_names(parameter)}

    def _moment_names(self, parameter: nn.Parameter) -> tuple[str, ...]:
        state = self.optimizer.state.get(parameter, {})
        return tuple(n for n, value in state.items() if torch.is_tensor(value) and value.shape == parameter.shape)

    def _moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        return self._local(self.optimizer.state[parameter][name])

    def _set_state(
        self, name: str, parameter: nn.Parameter, moments: Mapping[str, Tensor], extras: Mapping[str, Any]
    ) -> None:
        if moments:
            wrapped = {key: self._placements[name].wrap(moment, parameter.shape) for key, moment in moments.items()}
            self.optimizer.state[parameter] = {**extras, **wrapped}

    # What a rank method needs.

    def shape(self, layer: str) -> tuple[int, int]:
        """``(out, in)`` of a layer."""
        return matrix_shape(self.skeleton.get_submodule(layer))

    def _matrix(self, layer: str, weight: Tensor) -> Tensor:
        """Rows of a dense layer's weight, or of a moment of it, as rows of its matrix ``(out, in)``."""
        kind = kind_of(self.skeleton.get_submodule(layer))
        assert kind is not None
        return kind.matrix(weight)

    def placement(self, layer: str) -> RowPlacement:
        """How the rows of a layer's factors, or of its weight while it is dense, are divided."""
        return self._placements[f"{layer}.U" if layer in self.layout else f"{layer}.weight"]

    def set_base_scale(self, scale: float) -> None:
        """Set the factor ``a`` of every base."""
        if scale != self._base_scale:
            self._base_scale = scale
            set_base_scale(self.module, scale)

    def factors(self) -> dict[str, Factors]:
        """Rows of every low-rank layer's factors that this process alone counts."""
        return {layer: self.counted(layer, held) for layer, held in self.held_rows(self.layout).items()}

    def counted(self, layer: str, held: Factors) -> Factors:
        """Of rows such as those of ``held_rows``, those that this process alone counts."""
        placement, (out_features, in_features) = self.placement(layer), self.shape(layer)
        return Factors(placement.counted(held.U, out_features), placement.counted(held.V, in_features))

    def dense_factors(self, layers: Iterable[str]) -> dict[str, DenseRows]:
        """The weights of dense layers as factors: rows that this process alone counts."""
        parameters = self.parameters()
        rows = {}
        for layer in layers:
            placement, (out_features, in_features) = self.placement(layer), self.shape(layer)
            weight = placement.counted(self._local(parameters[f"{layer}.weight"]), out_features)
            rows[layer] = DenseRows(self._matrix(layer, weight), *placement.counted_rows(in_features))
        return rows

    def held_rows(self, layers: Iterable[str]) -> dict[str, Factors]:
        """All rows of the factors of layers that this process holds, counted or not; they share memory with the
        model."""
        parameters = self.parameters()
        return {layer: Factors(*(self._local(parameters[f"{layer}.{factor}"]) for factor in "UV")) for layer in layers}

    @torch.no_grad()
    def set_columns(self, layer: str, first: int, U: Tensor | float, V: Tensor | float) -> None:
        """Overwrite the columns from ``first`` on of this process's rows of a layer's factors."""
        parameters = self.parameters()
        for factor, columns in (("U", U), ("V", V)):
            self._local(parameters[f"{layer}.{factor}"])[:, first:] = columns
