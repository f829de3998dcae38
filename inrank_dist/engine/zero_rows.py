"""Access by rows to parameters and moments that DeepSpeed holds in flat buffers. It gathers one parameter at a time."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..optim import moment_names
from .engine import Engine
from .placement import RowPlacement
from .reshapable import Rows


class ZeroRows(Engine):
    """Reads and writes parameters and moments of a DeepSpeed engine by rows, divided as by FSDP2.

    Attributes:
        stage: stage of ZeRO.
        row_placement: placement of every parameter.
        deepspeed, utils: the modules ``deepspeed`` and ``deepspeed.utils``, imported on demand.
        config: configuration of DeepSpeed.
    """

    stage: int
    row_placement: RowPlacement
    deepspeed: Any
    utils: Any
    config: Mapping[str, Any]

    @property
    def _plain_moments(self) -> tuple[str, ...]:
        return moment_names(self.optimizer_settings, "plain")

    def _find_placements(self, module: nn.Module) -> dict[str, RowPlacement]:
        return {name: self.row_placement for name, _ in module.named_parameters(remove_duplicate=False)}

    def _assign(self, module: nn.Module, rows: Rows) -> None:
        placed: dict[int, nn.Parameter] = {}
        for name, parameter in list(module.named_parameters(remove_duplicate=False)):
            if id(parameter) not in placed:
                whole = self._gather(rows(name, parameter), parameter.shape)
                made = nn.Parameter(whole, requires_grad=parameter.requires_grad)
                if self.stage == 3:
                    # Partition each parameter at once, so that no process ever holds the unsharded model.
                    self.deepspeed.zero.Init(module=nn.ParameterList([made]), config_dict_or_path=self.config)
                placed[id(parameter)] = made
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, placed[id(parameter)])

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return cast(torch.Size, getattr(parameter, "ds_shape", parameter.shape))

    def _gather(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """All-gather the rows of all processes and return the unsharded tensor."""
        most = -(-shape[0] // self.context.world_size)
        padded = rows.new_zeros(most, *shape[1:])
        padded[: rows.shape[0]] = rows
        whole = rows.new_empty(most * self.context.world_size, *shape[1:])
        dist.all_gather_into_tensor(whole, padded)
        return whole[: shape[0]].clone() if len(whole) > shape[0] else whole

    def _cut(self, whole: Tensor) -> Tensor:
        """Return a copy of this process's rows of an unsharded tensor."""
        return whole[slice(*self.row_placement.rows(whole.shape[0]))].clone()

    def _part(self, whole: Tensor) -> Tensor:
        """Return this process's part of an unsharded tensor as ZeRO-3 partitions it: flat and padded with zeros."""
        size = -(-whole.numel() // self.context.world_size)
        part = whole.reshape(-1)[self.context.rank * size : (self.context.rank + 1) * size]
        return torch.nn.functional.pad(part, (0, size - part.numel()))

    def _filled(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """Return this process's part of a flat tensor without the padding, whose values are undefined."""
        start = self.context.rank * part.numel()
        return part[: max(self._shape(parameter).numel() - start, 0)]

    def _local(self, tensor: Tensor) -> Tensor:
        """Return a copy of this process's rows of a parameter. With ZeRO-3, all processes must call it together."""
        with self.deepspeed.zero.GatheredParameters([tensor], enabled=self.stage == 3):
            return self._cut(tensor.detach())

    @torch.no_grad()
    def _write(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Overwrite a parameter and its master copy with an unsharded tensor."""
        with self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
            parameter.data.copy_(whole)
        if not parameter.requires_grad:
            return
        if self.stage == 3:
            self.utils.safe_set_local_fp32_param(parameter, self._part(whole))
        elif self.stage > 0:
            self.utils.safe_set_full_fp32_param(parameter, whole)

    def _moment_names(self, parameter: nn.Parameter) -> tuple[str, ...]:
        return self._plain_moments if self.optimizer_steps and parameter.requires_grad else ()

    def _moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """Return a copy of this process's rows of a moment. All processes must call it together."""
        if self.stage == 0:
            return self._cut(self.optimizer.state[parameter][name])
        return self._cut(self.utils.safe_get_full_optimizer_state(parameter, name))

    def _set_state(
        self, name: str, parameter: nn.Parameter, moments: Mapping[str, Tensor], extras: Mapping[str, Any]
    ) -> None:
        self._set_moments(parameter, moments)

    def _set_moments(self, parameter: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
        for name, rows in moments.items():
            whole = self._gather(rows, self._shape(parameter))
            if self.stage == 0:
                self.optimizer.state[parameter][name].copy_(whole)
            elif self.stage == 3:
                self.utils.safe_set_local_optimizer_state(parameter, self._part(whole), name)
            else:
                self.utils.safe_set_full_optimizer_state(parameter, whole, name)

    def restore(self, steps: int, read: Callable[[dict[str, Tensor]], None]) -> None:
        self.optimizer_steps = steps
        names = self._plain_moments if steps else ()
        rows: dict[str, Tensor] = {}
        wrapped: dict[str, Tensor] = {}
        for name, parameter in self.parameters().items():
            shape = self._shape(parameter)
            first, end = self.row_placement.rows(shape[0])
            moments = names if parameter.requires_grad else ()
            for each in (name, *(f"optimizer.{moment}.{name}" for moment in moments)):
                rows[each] = torch.zeros(end - first, *shape[1:], device=self.device)
                wrapped[each] = self.row_placement.wrap(rows[each], shape)
        read(wrapped)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.full_like(state["step"], steps) if torch.is_tensor(state["step"]) else steps
        for name, parameter in self.parameters().items():
            self._write(parameter, self._gather(rows[name], self._shape(parameter)))
            if parameter.requires_grad:
                self._set_moments(parameter, {moment: rows[f"optimizer.{moment}.{name}"] for moment in names})

    def _held(self) -> Iterable[Tensor]:
        names = self._plain_moments
        for parameter in self.parameters().values():
            yield self._filled(parameter, cast(Any, parameter).ds_tensor) if self.stage == 3 else parameter.detach()
            if self.stage == 3 and parameter.requires_grad:
                yield from (
                    self._filled(parameter, self.utils.safe_get_local_optimizer_state(parameter, name))
                    for name in names
                )
        if self.stage < 3:
            for state in self.optimizer.state.values():
                yield from (state[name] for name in names)

    @torch.no_grad()
    def set_columns(self, layer: str, first: int, U: Tensor | float, V: Tensor | float) -> None:
        parameters = self.parameters()
        for factor, columns in (("U", U), ("V", V)):
            parameter = parameters[f"{layer}.{factor}"]
            rows = self._local(parameter)
            rows[:, first:] = columns
            self._write(parameter, self._gather(rows, self._shape(parameter)))
