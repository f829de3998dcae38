"""Low-rank training of a model in a user's training loop."""

import copy
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..lowrank.convert import LayerLayout, freeze_rest
from ..lowrank.division import Processes
from ..lowrank.kinds import linearise
from ..lowrank.layer import set_activation
from ..lowrank.materialize import materialize
from ..lowrank.merge import merge
from ..method.controller import RankController
from ..method.initial import StartValues, fits, layer_shapes, start_layout
from ..method.settings import LowRankSettings
from ..models.values import ModelValues, named_buffers
from ..runtime.agreement import agree
from ..runtime.errors import UserError
from .user_model import Groups, UserModel

log = logging.getLogger("inrank_dist")

STATE = "inrank.state"
"""Key of the run's JSON state, stored as uint8, in a state dict."""


class LowRankRun:
    """A model with low-rank layers, its optimizer, and the rank events that change them.

    The model can be any ``nn.Module``. It is built on ``meta``, its target layers are replaced by low-rank layers, it
    is parallelized, and its parameters are then initialised. At a rank event the model and its optimizer are rebuilt
    with the new shapes, because neither FSDP2 nor an optimizer notices a replaced parameter. ``run.model``,
    ``run.optimizer`` and ``run.scheduler`` may therefore be new objects after ``after_step``.

    All processes of the default process group must make the same calls. Initial values and new modes depend only on
    ``seed`` and the module names, not on the number of processes.

    Args:
        model: function that returns the dense model. It is called twice: under ``torch.device("meta")`` for the shapes,
            and on the CPU with ``seed`` set for the initial values. The second call is omitted if ``initial`` is given.
        method: ``InRank(...)``, ``FixedRank(...)``, ``DeepLoRA(...)``, ``PretrainThenFactorise(...)``,
            ``Published(...)``, or any ``LowRankSettings``.
        optimizer: function that returns the optimizer for a list of parameter groups. The first group holds the
            matrices, the second holds all other parameters and sets ``weight_decay`` to 0.
        parallelize: function that applies activation checkpointing, compilation and ``fully_shard`` to the model in
            place, while the model is on ``meta``. It is called again after each rank event. By default the model is not
            sharded.
        wrap: function that wraps the initialised model, for example in ``DistributedDataParallel``. Its result becomes
            ``run.model``. It is called again after each rank event.
        scheduler: function that returns the learning rate scheduler of an optimizer.
        initial: dense model on the CPU that provides the initial values of all layers except the factored ones. With
            ``PretrainThenFactorise`` it provides those, too.
        seed: seed of the initial values and of new modes.
        device: device of the model. Defaults to the current GPU, or to the CPU without a GPU.
        total_steps: number of optimizer steps of the whole run. Required by ``dense_fraction`` and by ``freeze_step:
            auto``.

    Attributes:
        model: the model to call.
        optimizer: the optimizer of ``model``.
        scheduler: the scheduler of ``optimizer``, or None without the argument ``scheduler``.
        step: number of optimizer steps, counted by ``after_step``.

    Raises:
        UserError: if a layer, the optimizer, the method or the kind of sharding is not supported.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        method: LowRankSettings,
        optimizer: Callable[[Groups], Optimizer],
        *,
        parallelize: Callable[[nn.Module], nn.Module | None] | None = None,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        initial: nn.Module | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        total_steps: int | None = None,
    ) -> None:
        _check_functions(model, optimizer)
        total_steps = _check_method(method, total_steps)
        self._method, self._make_scheduler = method, scheduler
        self._groups: list[dict[str, Any]] = []  # options of the optimizer replaced by an event
        self._schedule: dict[str, Any] = {}
        with torch.device("meta"):
            self._dense = model()
        if initial is None:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(seed)
                initial = model()
        else:
            initial = copy.deepcopy(initial)
        skeleton = copy.deepcopy(self._dense)
        self._shapes = layer_shapes(skeleton, method)
        for each in (skeleton, initial):
            linearise(each, self._shapes)
        if method.train_only_factors:
            freeze_rest(skeleton, self._shapes)
        dense = ModelValues(initial)
        values = StartValues(dense, self._shapes, method, seed)
        self._holder = UserModel(
            skeleton,
            start_layout(self._shapes, method),
            values,
            dense.buffer,
            device=_device(device),
            processes=_processes(_device(device)),
            method=method,
            optimizer=optimizer,
            parallelize=parallelize,
            wrap=wrap,
            before_release=self._remember,
        )
        if self._holder.processes.count > 1 and parallelize is None and wrap is None:
            log.warning(
                "warning: %d processes but neither parallelize nor wrap: your loop must average the gradients itself",
                self._holder.processes.count,
            )
        self._controller = RankController(self._holder, values, method, seed, total_steps)
        self.step = 0
        self._started = method.outer_init != "gradient" or method.depth == 2
        self.scheduler = scheduler(self.optimizer) if scheduler else None
        self._controller.before_step(0)

    @property
    def model(self) -> nn.Module:
        return self._holder.model

    @property
    def optimizer(self) -> Optimizer:
        return self._holder.optimizer

    @property
    def ranks(self) -> dict[str, int]:
        """Active rank of each low-rank layer, by layer name. Empty while the layers are still dense."""
        return {name: layer.rank for name, layer in self._holder.layout.items()}

    @property
    def frozen(self) -> bool:
        """Whether the ranks are frozen."""
        return self._controller.frozen

    def table(self) -> dict[str, dict[str, Any]]:
        """Return the rank statistics of each layer, by layer name.

        They are the active rank, the rank found by the rule, the null rank, the explained ratio and the shape.
        """
        return self._controller.table()

    def start(self, backward: Callable[[], object]) -> None:
        """Initialise ``U`` and ``V`` from the gradient before the first step, as ``outer_init: gradient`` requires.

        ``run.model`` and ``run.optimizer`` may be new objects afterwards.

        Args:
            backward: function that runs the forward and backward passes on the first batch. It is called twice.
        """
        self._controller.start(lambda: self._holder.gradients(backward))
        self._carry_over()
        self._controller.before_step(0)
        self._started = True

    def after_step(self, backward: Callable[[], object] | None = None) -> list[dict[str, Any]]:
        """Count an optimizer step and perform the rank event that is due after it, if any.

        Args:
            backward: function that repeats the forward and backward passes on the batch of this step. Required by
                ``growth_init: gradient``. It is called twice if a layer grows, otherwise never.

        Returns:
            A record of each event with its step, its action and the changes of each layer. Empty if no event was due.

        Raises:
            UserError: if training has diverged, or if ``backward`` is required but missing.
            Disagreement: if the processes decided on different ranks. Nothing has been modified in that case.
        """
        if backward is None and self._method.growth_init == "gradient":
            raise UserError("growth_init is gradient, which needs gradients; write after_step(backward)")
        if self.step == 0 and not self._started:
            raise UserError("outer_init is gradient, which needs a gradient; write run.start(backward) before step 1")
        self.step += 1
        gradients = None if backward is None else lambda: self._holder.gradients(backward)
        records = self._controller.after_step(self.step, gradients)
        self._carry_over()
        self._controller.before_step(self.step)
        return records

    def _remember(self) -> None:
        """Keep the state that the next optimizer and scheduler need, without references to the old parameters."""
        self._groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        if self.scheduler is not None:
            self._schedule, self.scheduler = self.scheduler.state_dict(), None

    def _carry_over(self) -> None:
        """Restore the parameter group options of a new optimizer and the state of a new scheduler."""
        if not self._groups:
            return
        if self._make_scheduler is not None:
            self.scheduler = self._make_scheduler(self.optimizer)
            self.scheduler.load_state_dict(self._schedule)
        for new, old in zip(self.optimizer.param_groups, self._groups, strict=True):
            new.update(old)
        self._groups = []

    def merge(self) -> nn.Module:
        """Return the dense model on the CPU, unsharded, with each product of factors merged into one weight.

        All processes must call it if the model is sharded, because it gathers the parameters.
        """
        whole = {name: _whole(p).cpu() for name, p in self._holder.parameters().items()}
        model = self._holder.low_rank_copy()
        buffers = dict(named_buffers(self._holder.module))
        materialize(model, lambda name: buffers[name], torch.device("cpu"))
        set_activation(model, self._method.activation)
        self._holder.scale_bases(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(whole[name])
        return merge(model, self._dense)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the parameters, persistent buffers, optimizer state and ranks, by name.

        Sharded tensors are DTensors. The tensors share memory with the run, so save or copy them before the next step.
        The ranks and all other state that is not a tensor are one uint8 tensor of JSON text.
        """
        text = json.dumps(
            {
                "step": self.step,
                "layout": {name: list(astuple(each)) for name, each in self._holder.layout.items()},
                "controller": self._controller.state_dict(),
                "groups": [
                    {key: value for key, value in group.items() if key != "params" and _is_json(value)}
                    for group in self.optimizer.param_groups
                ],
                "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            },
            default=_jsonable,
        )
        return {**self._holder.state(), STATE: torch.tensor(list(text.encode()), dtype=torch.uint8)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state returned by ``state_dict`` on the same number of processes.

        Use ``save`` and ``load`` to change the number of processes.

        Raises:
            UserError: if the state belongs to another model. Nothing has been modified in that case.
        """
        shapes = {name: tensor.shape for name, tensor in state.items() if name != STATE}
        self._restore(json.loads(bytes(state[STATE].tolist())), shapes)
        with torch.no_grad():
            for name, tensor in self._holder.state().items():
                tensor.copy_(state[name])

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint with ``torch.distributed.checkpoint``. All processes must call it."""
        dcp.save(self.state_dict(), checkpoint_id=str(folder))

    def load(self, folder: str | Path) -> None:
        """Load a checkpoint written by ``save``. All processes must call it.

        The number of processes and the sharding may differ from those of ``save``, as long as parameters are sharded by
        rows.

        Raises:
            UserError: if the folder does not contain a checkpoint of a ``LowRankRun``, or it belongs to another model.
        """
        try:
            entries = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
            shapes = {name: each.size for name, each in entries.items() if isinstance(each, TensorStorageMetadata)}
            text = torch.zeros(shapes.pop(STATE), dtype=torch.uint8)
        except (OSError, KeyError) as error:
            raise UserError(f"{folder} holds no checkpoint of a LowRankRun ({error!r}); write another folder") from None
        dcp.load({STATE: text}, checkpoint_id=str(folder))
        self._restore(json.loads(bytes(text.tolist())), shapes)
        dcp.load(self._holder.state(), checkpoint_id=str(folder))

    def _restore(self, saved: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> None:
        layout = {name: LayerLayout(*each) for name, each in saved["layout"].items()}
        if not fits(layout, self._shapes, self._method):
            other = sorted(layout.keys() ^ self._shapes.keys())[0]
            raise UserError(f"the checkpoint has other low-rank layers ({other}); write the targets that it has")
        self._holder.rebuild(layout, shapes)
        self.step = saved["step"]
        self._controller.load_state_dict(saved["controller"])
        self._carry_over()
        for group, old in zip(self.optimizer.param_groups, saved["groups"], strict=True):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in old.items()})
        if self.scheduler is not None and saved["scheduler"] is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        self._controller.before_step(self.step)


def _check_functions(model: object, optimizer: object) -> None:
    """Reject objects where functions that make them are needed."""
    if isinstance(model, nn.Module):
        raise UserError(
            f"model is a {type(model).__name__}; write a function that makes it, such as lambda: "
            f"{type(model).__name__}(...), and initial=model to keep its values"
        )
    if isinstance(optimizer, Optimizer):
        name = type(optimizer).__name__
        raise UserError(
            f"optimizer is an object of {name}; write a function, such as lambda groups: {name}(groups, lr=1e-3)"
        )


def _check_method(method: LowRankSettings, total_steps: int | None) -> int:
    """Reject unsupported methods. Return the number of steps of the run, or 1 if it is unknown and not needed."""
    if method.mode == "full":
        raise UserError("the method has mode full, which factors nothing; write InRank(...) or FixedRank(...)")
    if method.frobenius_decay:
        raise UserError("frobenius_decay is a setting of the trainer's engines; write 0 and decay in your optimizer")
    if method.depth > 2 and method.outer_lr_scale not in (0, 1):
        raise UserError(
            f"outer_lr_scale is {method.outer_lr_scale:g}, but learning rates are your optimizer's; write 0 to fix U "
            "and V, or 1"
        )
    if method.initial_energy is not None and not method.dense_fraction:
        raise UserError("initial_energy is a setting of the trainer; write initial_rank")
    if method.total_steps and total_steps and method.total_steps != total_steps:
        raise UserError(f"total_steps is {total_steps}, but the method is for {method.total_steps}; write it once")
    needs_total = method.dense_fraction or (method.freezes and method.freeze_step == "auto")
    total = total_steps or method.total_steps
    if needs_total and total is None:
        raise UserError("the method needs to know the length of the run; write total_steps")
    return total or 1


def _device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _processes(device: torch.device) -> Processes:
    """Return the processes of the default process group."""
    if not dist.is_initialized():
        return Processes(0, 1, lambda tensor: None)

    def reduce(tensor: Tensor) -> None:
        dist.all_reduce(tensor)

    return Processes(dist.get_rank(), dist.get_world_size(), reduce, lambda what, answers: agree(what, answers, device))


def _whole(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def _is_json(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str | tuple | list)


def _jsonable(value: object) -> object:
    if torch.is_tensor(value):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be saved")
