"""Saving and restoring the parameters and moments of a model by rows."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import OptimizerSettings, Role, moment_names
from .placement import RowPlacement
from .reshapable import ReshapableModel


@dataclass(frozen=True)
class SavedRows:
    """One process's part of a saved tensor.

    Attributes:
        name: name of the tensor, as in ``Engine.tensors``.
        shape: shape of the unsharded tensor.
        dtype: its dtype.
        first, count: first row and number of rows that this process saves. ``count`` may be 0.
        fetch: returns these rows, which may share memory with the engine. With ZeRO it is a collective: all processes
            must fetch all tensors in the order of ``Engine.saved_rows``.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    first: int
    count: int
    fetch: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size of these rows in bytes."""
        return self.count * self.shape[1:].numel() * self.dtype.itemsize


def _counted(placement: RowPlacement, held: Callable[[], Tensor], size: int) -> Tensor:
    return placement.counted(held(), size)


class CheckpointableModel(ReshapableModel):
    """Model whose parameters and moments are saved and restored by rows.

    Attributes:
        optimizer_settings: the optimizer, which determines the moments.
        optimizer_steps: number of optimizer steps taken.
    """

    optimizer_settings: OptimizerSettings
    optimizer_steps: int
    _roles: dict[str, Role]

    def _set_state(
        self, name: str, parameter: nn.Parameter, moments: Mapping[str, Tensor], extras: Mapping[str, Any]
    ) -> None:
        if moments.keys() & {"exp_avg"} and self.optimizer_settings.entry.counts_steps:
            extras = {"step": torch.tensor(float(self.optimizer_steps), device=self.device)}
        super()._set_state(name, parameter, moments, extras)

    def _step_and_betas(self, extras: Mapping[str, Any]) -> tuple[float, tuple[float, float]]:
        return self.optimizer_steps, (self.optimizer_settings.beta1, self.optimizer_settings.beta2)

    @torch.no_grad()
    def is_lost(self) -> Tensor:
        """Check whether any parameter or moment on this process is not finite (inf or nan).

        Returns:
            A float64 scalar on the device, 1 if so and 0 otherwise.
        """
        # aminmax needs no temporary, so it is much faster than isfinite. It propagates nan, and inf is an extreme.
        extremes = [torch.stack(torch.aminmax(rows)).to(self.device) for rows in self._held() if rows.numel()]
        finite = torch.cat(extremes or [torch.zeros(1, device=self.device)]).isfinite().all()
        return (~finite).double()

    def _held(self) -> Iterable[Tensor]:
        """Return this process's rows of all parameters and moments."""
        return (self._local(tensor) for tensor in self.tensors().values())

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return the unsharded shape of a parameter."""
        return parameter.shape

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters and moments by name, as DTensors if they are sharded.

        A parameter has its own name, a moment a name such as ``optimizer.exp_avg.NAME``. The tensors may share memory
        with the engine.
        """
        saved: dict[str, Tensor] = {}
        for name, parameter in self.parameters().items():
            shape, placement = self._shape(parameter), self._placements[name]
            saved[name] = placement.wrap(self._local(parameter), shape)
            for moment, rows in self._moments(parameter).items():
                saved[f"optimizer.{moment}.{name}"] = placement.wrap(rows, shape)
        return saved

    def saved_rows(self) -> list[SavedRows]:
        """Return this process's part of each tensor to save. Over all processes, each row occurs exactly once.

        The rows are not fetched or copied yet. The names and their order are the same on all processes.
        """
        saved: list[SavedRows] = []
        for name, parameter in self.parameters().items():
            shape, placement = self._shape(parameter), self._placements[name]
            first, end = placement.counted_rows(shape[0])
            sources = {name: partial(self._local, parameter)}
            for moment in self._moment_names(parameter):
                sources[f"optimizer.{moment}.{name}"] = partial(self._moment, parameter, moment)
            for key, held in sources.items():
                fetch = partial(_counted, placement, held, shape[0])
                saved.append(SavedRows(key, shape, parameter.dtype, first, end - first, fetch))
        return saved

    def restore(self, steps: int, read: Callable[[dict[str, Tensor]], None]) -> None:
        """Restore the parameters and moments from a checkpoint.

        Args:
            steps: number of optimizer steps at the time of the checkpoint.
            read: fills tensors with the saved values in place. It is called with a dictionary as ``tensors`` returns.
        """
        self.optimizer_steps = steps
        if steps:
            parameters = self.parameters()
            for name, role in self._roles.items():
                local = self._local(parameters[name])
                moments = moment_names(self.optimizer_settings, role)
                self._set_state(name, parameters[name], {moment: torch.zeros_like(local) for moment in moments}, {})
        read(self.tensors())

    def parameter_count(self) -> int:
        """Return the current number of parameters of the model, including a fading or frozen base."""
        return sum(self._shape(parameter).numel() for parameter in self.parameters().values())

    def trained_count(self) -> int:
        """Return the current number of parameters that are trained."""
        return sum(self._shape(each).numel() for each in self.parameters().values() if each.requires_grad)
