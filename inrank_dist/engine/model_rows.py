"""The rows that a process holds of a model's parameters and of its optimizer's state."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..lowrank.convert import Layout
from ..lowrank.division import Processes
from ..lowrank.kinds import kind_of, matrix_shape
from ..lowrank.materialize import clean
from ..lowrank.spectrum import DenseRows, Factors
from .placement import RowPlacement, local_rows


class ModelRows:
    """Reads and writes this process's rows of a model; what a rank method needs of it (``method.holder``).

    Attributes:
        skeleton: the dense model on ``meta``.
        module: the model; its parameters are those of the optimizer.
        model: what is called; ``module`` itself or a wrapper of it such as DistributedDataParallel.
        optimizer: of ``module``.
        layout: low-rank layer -> its rank and number of modes.
        device: of the model.
        processes: all processes.
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

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """This process's rows of a parameter's gradient, copied."""
        assert parameter.grad is not None
        return self._local(parameter.grad).clone()

    def _factor_gradients(self) -> dict[str, Factors]:
        """All rows of the gradients of every layer's factors that this process holds, copied."""
        parameters = self.parameters()
        return {
            layer: Factors(*(self._gradient(parameters[f"{layer}.{factor}"]) for factor in "UV"))
            for layer in self.layout
        }

    @torch.no_grad()
    def set_columns(self, layer: str, first: int, U: Tensor | float, V: Tensor | float) -> None:
        """Overwrite the columns from ``first`` on of this process's rows of a layer's factors."""
        parameters = self.parameters()
        for factor, columns in (("U", U), ("V", V)):
            self._local(parameters[f"{layer}.{factor}"])[:, first:] = columns

    def check(self) -> None:
        """Assert that the optimizer's parameters are the model's, every one of them."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        present = {id(p) for p in self.parameters().values() if p.requires_grad}
        assert held == present, "the optimizer holds other parameters than the model"
