"""Model and optimizer of a ``LowRankRun``."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from ..engine.reshapable import ReshapableModel, Values
from ..lowrank.convert import Layout, convert
from ..lowrank.division import Processes
from ..lowrank.layer import set_activation, set_base_scale
from ..lowrank.materialize import clean
from ..lowrank.spectrum import Factors
from ..method.settings import LowRankSettings
from ..models.values import named_buffers
from ..optim.groups import decayed_parameters
from ..optim.moments import check_state
from ..runtime.errors import UserError

Groups = list[dict[str, Any]]


class UserModel(ReshapableModel):
    """The reshapable model of a ``LowRankRun`` with its optimizer."""

    def __init__(
        self,
        skeleton: nn.Module,
        layout: Layout,
        values: Values,
        buffers: Values,
        *,
        device: torch.device,
        processes: Processes,
        method: LowRankSettings,
        optimizer: Callable[[Groups], Optimizer],
        parallelize: Callable[[nn.Module], nn.Module | None] | None,
        wrap: Callable[[nn.Module], nn.Module] | None,
        before_release: Callable[[], None],
    ) -> None:
        self._before_release = before_release
        self._method, self._optimizer, self._user_parallelize, self._user_wrap = method, optimizer, parallelize, wrap
        super().__init__(skeleton, layout, values, buffers, device=device, processes=processes)
        check_state(self.optimizer)

    def release(self) -> None:
        self._before_release()
        del self._called
        super().release()

    def _prepare(self, module: nn.Module, layout: Layout) -> None:
        set_activation(module, self._method.activation)

    def _parallelize(self, module: nn.Module) -> None:
        self._called = module
        if self._user_parallelize is not None:
            self._called = self._user_parallelize(module) or module
        _refuse_flat(self._called)

    def _wrap(self, module: nn.Module) -> nn.Module:
        called = self._called if self._user_wrap is None else self._user_wrap(self._called)
        _refuse_flat(called)
        return called

    def _make_optimizer(self, module: nn.Module) -> Optimizer:
        decayed = decayed_parameters(module, factors=True)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        groups: Groups = [
            {"params": [p for name, p in trained.items() if name in decayed]},
            {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0.0},
        ]
        return self._optimizer([group for group in groups if group["params"]])

    def low_rank_copy(self) -> nn.Module:
        """Return a copy of the current model on ``meta``."""
        return convert(self.skeleton, self.layout)

    def gradients(self, backward: Callable[[], object]) -> dict[str, Factors]:
        """Return the gradients of the factors of every layer, without an optimizer step.

        Args:
            backward: function that runs the forward and backward passes.
        """
        self.optimizer.zero_grad()
        backward()
        found = self._factor_gradients()
        self.optimizer.zero_grad()
        return found

    def scale_bases(self, model: nn.Module) -> None:
        """Set the scale of every dense base in ``model`` to that of this model."""
        set_base_scale(model, self._base_scale)

    def state(self) -> dict[str, Tensor]:
        """Return the parameters, persistent buffers and optimizer state by name. They share memory with the model."""
        saved: dict[str, Tensor] = {}
        for name, parameter in self.parameters().items():
            saved[name] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if torch.is_tensor(value):
                    saved[f"optimizer.{key}.{name}"] = value
        for prefix, owner in self.module.named_modules():
            for leaf, buffer in owner.named_buffers(recurse=False):
                if leaf not in owner._non_persistent_buffers_set:
                    saved[clean(f"{prefix}.{leaf}" if prefix else leaf)] = buffer
        return saved

    def rebuild(self, layout: Layout, shapes: Mapping[str, torch.Size]) -> None:
        """Rebuild the model for loading, with parameters and optimizer state set to zero.

        Args:
            layout: layout of the low-rank layers in the checkpoint.
            shapes: global shape of each tensor in the checkpoint, by the names of ``state``.

        Raises:
            UserError: if the tensors belong to another model. Nothing has been modified in that case.
        """
        self._refuse_other(layout, shapes)
        buffers = dict(named_buffers(self.module))
        self.release()
        self._build(layout, self._zeros, lambda name: buffers[name])
        parameters = self.parameters()
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for name, parameter in parameters.items():
            for key in [key for key in shapes if key.startswith("optimizer.") and key.endswith(f".{name}")]:
                state = key.removeprefix("optimizer.").removesuffix(f".{name}")
                if "." in state:  # belongs to another parameter whose name ends the same way
                    continue
                if shapes[key] == parameter.shape:
                    value = torch.zeros_like(parameter)
                else:
                    group = groups[id(parameter)]
                    on_device = group.get("fused") or group.get("capturable")
                    value = torch.zeros(shapes[key], device=self.device if on_device else "cpu")
                self.optimizer.state[parameter][state] = value

    def _refuse_other(self, layout: Layout, shapes: Mapping[str, torch.Size]) -> None:
        """Raise UserError unless the shapes are those of this model with ``layout``."""
        expected = {name: p.shape for name, p in convert(self.skeleton, layout).named_parameters()}
        saved = {name: shape for name, shape in shapes.items() if not name.startswith("optimizer.")}
        buffers = {name for name, _ in named_buffers(self.module)}
        for name in sorted(expected.keys() | saved.keys() - buffers):
            if expected.get(name) != saved.get(name):
                raise UserError(
                    f"the checkpoint is of another model: {name} is {saved.get(name, 'not in it')} and should be "
                    f"{expected.get(name, 'not there')}; write the model that it was saved from"
                )


def _refuse_flat(model: nn.Module) -> None:
    """Raise UserError if a module is wrapped in FSDP1, which flattens parameters."""
    for name, part in model.named_modules():
        if isinstance(part, FullyShardedDataParallel):
            raise UserError(
                f"{name or 'the model'} is wrapped in FullyShardedDataParallel (FSDP1), which flattens parameters; "
                "write torch.distributed.fsdp.fully_shard"
            )
