"""What is saved of a model and its optimizer, and taken over from what was saved."""

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
    """One process's part of a tensor that is saved.

    Attributes:
        name: of the tensor, as in ``Engine.tensors``.
        shape: of the whole.
        dtype: of it.
        first, count: the rows of it that this process alone saves; there may be none.
        fetch: gives these rows; they may share memory with the engine. With ZeRO it is a collective, so that every
            process fetches every tensor, in the order of ``Engine.saved_rows``.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    first: int
    count: int
    fetch: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of these rows."""
        return self.count * self.shape[1:].numel() * self.dtype.itemsize


def _counted(placement: RowPlacement, held: Callable[[], Tensor], size: int) -> Tensor:
    return placement.counted(held(), size)


class CheckpointableModel(ReshapableModel):
    """A model whose parameters and moments are saved by rows.

    Attributes:
        optimizer_settings: which optimizer, so which moments there are.
        optimizer_steps: taken so far.
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
        """Whether anything that this process holds is not finite; float64, 1 or 0, on the device."""
        # One pass without a temporary; aminmax propagates nan, and inf is an extreme. isfinite takes 14 times as long.
        extremes = [torch.stack(torch.aminmax(rows)).to(self.device) for rows in self._held() if rows.numel()]
        finite = torch.cat(extremes or [torch.zeros(1, device=self.device)]).isfinite().all()
        return (~finite).double()

    def _held(self) -> Iterable[Tensor]:
        """Every parameter and moment, as far as this process holds it."""
        return (self._local(tensor) for tensor in self.tensors().values())

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        """Shape of a parameter as a whole."""
        return parameter.shape

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save, by name: parameters under their own names, moments under names such as
        ``optimizer.exp_avg.NAME``. Sharded ones are DTensors. They may share memory with the engine."""
        saved: dict[str, Tensor] = {}
        for name, parameter in self.parameters().items():
            shape, placement = self._shape(parameter), self._placements[name]
            saved[name] = placement.wrap(self._local(parameter), shape)
            for moment, rows in self._moments(parameter).items():
                saved[f"optimizer.{moment}.{name}"] = placement.wrap(rows, shape)
        return saved

    def saved_rows(self) -> list[SavedRows]:
        """This process's part of everything to save: over all processes every row of every tensor exactly once.

        Nothing is fetched or copied yet. The names, and their order, are the same on every process.
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
        """Take over everything that was saved.

        Args:
            steps: optimizer steps taken by then.
            read: fills tensors such as ``tensors()`` gave when they were saved, in place.
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
        """Parameters of the model as it is now, a fading or frozen base included."""
        return sum(self._shape(parameter).numel() for parameter in self.parameters().values())
