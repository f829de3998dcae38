"""Access to this process's rows of the parameters and the optimizer state."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..lowrank.convert import Layout
from ..lowrank.division import Processes, sum_over_processes
from ..lowrank.kinds import kind_of, matrix_shape
from ..lowrank.layer import core_names
from ..lowrank.materialize import clean
from ..lowrank.spectrum import DenseRows, Factors
from .placement import RowPlacement, local_rows


class ModelRows:
    """Reads and writes this process's rows of a model, as rank methods require (``method.holder``).

    If several processes hold the same row, exactly one of them counts it in sums over all processes. The "counted" rows
    of a process are the rows that it counts.

    Attributes:
        skeleton: dense model on ``meta``.
        module: the model, whose parameters the optimizer updates.
        model: the callable model, ``module`` itself or a wrapper such as DistributedDataParallel.
        optimizer: optimizer of ``module``.
        layout: rank and number of modes of each low-rank layer.
        device: device of the model.
        processes: all processes of the job.
    """

    skeleton: nn.Module
    module: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    layout: Layout
    device: torch.device
    processes: Processes
    _placements: dict[str, RowPlacement]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name, resharded as between steps. Tied parameters occur once."""
        # FSDP2 keeps the root group unsharded after a forward pass. Its parameters are then plain tensors, not the
        # DTensors of the optimizer.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return {clean(name): parameter for name, parameter in self.module.named_parameters()}

    def _local(self, tensor: Tensor) -> Tensor:
        """Return this process's rows of a parameter, gradient or moment, sharing its memory."""
        return local_rows(tensor)

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return this process's rows of a parameter's moments, which is the optimizer state of the same shape."""
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

    def shape(self, layer: str) -> tuple[int, int]:
        """Return ``(out, in)`` of a layer."""
        return matrix_shape(self.skeleton.get_submodule(layer))

    def _matrix(self, layer: str, weight: Tensor) -> Tensor:
        """View rows of a dense layer's weight, or of one of its moments, as rows of the matrix ``(out, in)``."""
        kind = kind_of(self.skeleton.get_submodule(layer))
        assert kind is not None
        return kind.matrix(weight)

    def placement(self, layer: str) -> RowPlacement:
        """Return the placement of a layer's factors, or of its weight if it is dense."""
        return self._placements[f"{layer}.U" if layer in self.layout else f"{layer}.weight"]

    def factors(self) -> dict[str, Factors]:
        """Return the counted rows of the factors of all low-rank layers, and their cores.

        Communication: one all-reduce of ``8 R^2`` bytes per core; none if no layer is deep.
        """
        names = [(layer, f"{layer}.{core}") for layer, each in self.layout.items() for core in core_names(each.depth)]
        parameters = self.parameters()
        whole = self._gathered([(name, self._local(parameters[name])) for _, name in names])
        cores: dict[str, tuple[Tensor, ...]] = {}
        for (layer, _), core in zip(names, whole, strict=True):
            cores[layer] = (*cores.get(layer, ()), core)
        return {
            layer: replace(self.counted(layer, held), cores=cores.get(layer, ()))
            for layer, held in self.held_rows(self.layout).items()
        }

    def _gathered(self, held: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
        """Return square tensors, float64, with one all-reduce of all. All processes must call it together.

        Args:
            held: for each tensor, the name of a parameter with the same placement, and this process's rows.
        """
        parts = []
        for name, rows in held:
            placement, size = self._placements[name], rows.shape[1]
            part = torch.zeros(size, size, dtype=torch.float64, device=rows.device)
            part[slice(*placement.counted_rows(size))] = placement.counted(rows, size).double()
            parts.append(part)
        return sum_over_processes(parts, self.processes.sum)

    def counted(self, layer: str, held: Factors) -> Factors:
        """Return the counted rows, given this process's rows as from ``held_rows``."""
        placement, (out_features, in_features) = self.placement(layer), self.shape(layer)
        return Factors(placement.counted(held.U, out_features), placement.counted(held.V, in_features))

    def dense_factors(self, layers: Iterable[str]) -> dict[str, DenseRows]:
        """Return the counted rows of the weights of dense layers, as factors."""
        parameters = self.parameters()
        rows = {}
        for layer in layers:
            placement, (out_features, in_features) = self.placement(layer), self.shape(layer)
            weight = placement.counted(self._local(parameters[f"{layer}.weight"]), out_features)
            rows[layer] = DenseRows(self._matrix(layer, weight), *placement.counted_rows(in_features))
        return rows

    def held_rows(self, layers: Iterable[str]) -> dict[str, Factors]:
        """Return all of this process's rows of the factors of these layers, sharing memory with the model."""
        parameters = self.parameters()
        return {
            layer: Factors(self._local(parameters[f"{layer}.U"]), self._local(parameters[f"{layer}.V"]))
            for layer in layers
        }

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """Return a copy of this process's rows of a gradient."""
        assert parameter.grad is not None
        return self._local(parameter.grad).clone()

    def _factor_gradients(self) -> dict[str, Factors]:
        """Return a copy of this process's rows of the gradients of all factors."""
        parameters = self.parameters()
        return {
            layer: Factors(self._gradient(parameters[f"{layer}.U"]), self._gradient(parameters[f"{layer}.V"]))
            for layer in self.layout
        }

    @torch.no_grad()
    def set_columns(self, layer: str, first: int, U: Tensor | float, V: Tensor | float) -> None:
        """Overwrite the columns from ``first`` on in this process's rows of a layer's factors.

        Args:
            layer: name of a low-rank layer.
            first: first column.
            U, V: this process's rows of the new columns, ``(rows, R - first)``, or a number.
        """
        parameters = self.parameters()
        for factor, columns in (("U", U), ("V", V)):
            self._local(parameters[f"{layer}.{factor}"])[:, first:] = columns

    def check(self) -> None:
        """Assert that the optimizer holds exactly the trained parameters of the model."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        present = {id(p) for p in self.parameters().values() if p.requires_grad}
        assert held == present, "the optimizer holds other parameters than the model"
