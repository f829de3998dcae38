"""The trainer's engine: it takes optimizer steps and hands out what is saved. The training loop never asks which."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ..lowrank.convert import Layout
from ..lowrank.division import Processes
from ..lowrank.layer import set_activation, set_joining
from ..lowrank.spectrum import Factors, gram_matrices
from ..models import LanguageModel
from ..optim import (
    HeldRows,
    OptimizerSettings,
    build_optimizer,
    decayed_parameters,
    moment_names,
    parameter_kinds,
)
from ..runtime.context import Context
from .options import BuildOptions
from .parallelize import checkpoint_blocks, compile_blocks, shard_blocks, shard_mesh
from .placement import RowPlacement, local_rows
from .sharded import ShardedModel, Values

Batches = Sequence[tuple[Tensor, Tensor]]
"""Micro-batches of inputs and targets, each ``(B, T)`` int64."""


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


class Engine(ShardedModel):
    """A language model in one process, in replicas (DDP), or sharded by rows (FSDP2).

    Attributes:
        bad_gradient: whether this process computed a gradient that is not finite in the last ``accumulate``; bool.
        optimizer_steps: taken so far.

    Args:
        skeleton: dense model on ``meta``; it is never changed.
        layout: the low-rank layers at initialisation.
        values: initial values; None: zeros, to be read into.
        kind: of engine.
        shard_size: with fsdp, processes that share one copy of the model; None: all.
    """

    name: str
    skeleton: LanguageModel
    module: LanguageModel

    def __init__(
        self,
        skeleton: LanguageModel,
        layout: Layout,
        values: Values | None,
        *,
        context: Context,
        optimizer: OptimizerSettings,
        options: BuildOptions,
        kind: Literal["local", "ddp", "fsdp"] = "local",
        shard_size: int | None = None,
    ) -> None:
        self.context, self.name, self.plan = context, kind, skeleton.plan
        self.optimizer_settings, self.options = optimizer, options
        self.mesh = shard_mesh(context.device.type, context.world_size, shard_size) if kind == "fsdp" else None
        self.optimizer_steps = 0
        self.bad_gradient = torch.zeros((), dtype=torch.bool, device=context.device)
        self._compiled_for_growth = False
        super().__init__(
            skeleton,
            layout,
            values,
            skeleton.initial_values(0).buffer,
            device=context.device,
            processes=Processes(context.rank, context.world_size, context.sum, context.agree),
            moments_on_event=optimizer.moments_on_event,
        )

    # Building.

    def _prepare(self, module: nn.Module, layout: Layout) -> None:
        # By shapes, which ZeRO-3 takes from parameters.
        self._kinds = parameter_kinds(module, self.plan.block_modules(module), self.optimizer_settings)
        self._decayed = decayed_parameters(module, factors=self.options.frobenius_decay == 0)
        set_joining(module, self.options.fuse)
        set_activation(module, self.options.activation)
        if self.options.activation_checkpointing:
            checkpoint_blocks(module, self.plan)
        if self.options.compile:
            growing = any(layer.modes > layer.rank for layer in layout.values())
            if self._compiled_for_growth and not growing:
                torch.compiler.reset()  # what was compiled for growth is of no more use
            self._compiled_for_growth = growing
            graphs = self.options.cuda_graph and not growing and self.device.type == "cuda"
            compile_blocks(module, self.plan, dynamic=growing, cuda_graphs=graphs)
        if self.plan.bottom is not None:
            module.get_submodule(self.plan.bottom).register_forward_hook(self._observe)

    def _parallelize(self, module: nn.Module) -> None:
        if self.mesh is not None:
            shard_blocks(module, self.plan, self.mesh, bf16=self.options.bf16)

    def _wrap(self, module: nn.Module) -> nn.Module:
        if self.name != "ddp":
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # The newest torch calls it forward_sync_buffers; the oldest that we support knows only this name.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            return DistributedDataParallel(
                module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def _make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        dtype = torch.bfloat16 if self.options.bf16 else torch.float32
        return self._optimizer_of(module, matrix_dtype=dtype)

    def _optimizer_of(self, module: nn.Module, **options: Any) -> torch.optim.Optimizer:
        placement = self._uniform_placement
        rows = HeldRows(local_rows, placement.sum_over_shards, placement.split, placement.shard, placement.group)
        parameters = dict(module.named_parameters())
        return build_optimizer(parameters, self._kinds, self._decayed, self.optimizer_settings, rows=rows, **options)

    @property
    def _uniform_placement(self) -> RowPlacement:
        """All parameters of a language model are divided alike."""
        return next(iter(self._placements.values()))

    def _set_state(
        self, name: str, parameter: nn.Parameter, moments: Mapping[str, Tensor], extras: Mapping[str, Any]
    ) -> None:
        if "exp_avg" in moments:
            extras = {"step": torch.tensor(float(self.optimizer_steps), device=self.device)}
        super()._set_state(name, parameter, moments, extras)

    def _step_and_betas(self, extras: Mapping[str, Any]) -> tuple[float, tuple[float, float]]:
        return self.optimizer_steps, (self.optimizer_settings.beta1, self.optimizer_settings.beta2)

    # One optimizer step.

    def accumulate(self, batches: Batches, tokens: int, *, training: bool = True) -> Tensor:
        """Forward and backward of this process's share of a global batch.

        Args:
            batches: micro-batches of this process.
            tokens: tokens of the whole global batch, by which the loss is divided.
            training: with dropout; without, the gradient is that of the model as it is.

        Returns:
            This process's summed loss in nats, a float32 scalar on the device (no synchronisation).
        """
        self.model.train(training)
        self.bad_gradient.zero_()
        total = torch.zeros((), device=self.device)
        for index, (inputs, targets) in enumerate(batches):
            with self._accumulating(last=index == len(batches) - 1):
                loss = self.loss(inputs, targets)
                # Gradients are averaged over processes; the sum is wanted.
                self._backward(loss * (self.context.world_size / tokens))
            total += loss.detach()
        return total

    def _accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Context of one micro-batch; gradients are combined over processes in the last one only."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last or self.options.reduce_each_micro_batch)
            # Replicas need the sum of all micro-batches only: what is reduced within a copy travels between copies
            # once.
            self.module.set_requires_all_reduce(last)
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Summed loss of one micro-batch, in the model's present mode (train or eval)."""
        inputs, targets = (t.to(self.device, non_blocking=True) for t in (inputs, targets))
        if self.options.cuda_graph:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            loss: Tensor = self.model(inputs, targets)
        return loss

    def logits(self, inputs: Tensor) -> Tensor:
        """``(B, T, vocabulary)`` logits of ``(B, T)`` tokens; all processes call it together."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            logits: Tensor = self.model(inputs.to(self.device))
        return logits

    def _observe(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        """Note whether the gradient at the bottom of this process's own batch is finite: once gradients are combined,
        nobody can tell whose was not."""
        if output.requires_grad:
            output.register_hook(self._note)

    def _note(self, gradient: Tensor) -> None:
        self.bad_gradient.logical_or_(~gradient.detach().isfinite().all())

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

    def _sum_over_shards(self, tensor: Tensor) -> None:
        """Sum in place over the processes that hold different rows of the same replica."""
        self._uniform_placement.sum_over_shards(tensor)

    @torch.no_grad()
    def gradient_norm(self) -> tuple[Tensor, Tensor]:
        """Norm of the gradient over all parameters, and of what this process holds of it; float32 scalars on the
        device."""
        local = torch.nn.utils.get_total_norm(self._gradients()).to(self.device)
        norm = local.square()
        self._sum_over_shards(norm)
        return norm.sqrt(), local

    @torch.no_grad()
    def step(self, lr: float, norm: Tensor) -> None:
        """Clip the gradients, move the parameters, drop the gradients.

        Args:
            norm: from ``gradient_norm``.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if self.options.frobenius_decay > 0:
            self._decay_products(lr * self.optimizer_settings.matrix_scale * self.options.frobenius_decay)
        clip = self.options.grad_clip
        self._move((clip / (norm + 1e-6)).clamp(max=1.0) if clip > 0 else None)
        self.optimizer_steps += 1

    def _move(self, scale: Tensor | None) -> None:
        """Take the optimizer's step with the gradients times ``scale``, and drop them."""
        if scale is not None:
            torch._foreach_mul_(self._gradients(), scale)
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients; nothing else changes."""
        self.optimizer.zero_grad()

    def _gradients(self) -> list[Tensor]:
        return [self._local(p.grad) for p in self.parameters().values() if p.grad is not None]

    def _decay_products(self, rate: float) -> None:
        """``U -= rate * U (V^T V)`` and ``V -= rate * V (U^T U)``: the gradient of ``|U V^T|_F^2 / 2`` (arXiv
        2209.13569)."""
        grams = gram_matrices(self.factors(), self.context.sum)
        for layer, held in self.held_rows(self.layout).items():
            U, V = held.U, held.V
            U -= rate * (U @ grams[layer].V.to(U.dtype))
            V -= rate * (V @ grams[layer].U.to(V.dtype))

    def factor_gradients(self, batches: Batches, tokens: int) -> dict[str, Factors]:
        """Gradients of every layer's factors on a global batch, all rows that this process holds; nothing is moved."""
        self.accumulate(batches, tokens, training=False)
        parameters = self.parameters()
        gradients = {
            layer: Factors(*(self._gradient(parameters[f"{layer}.{factor}"]) for factor in "UV"))
            for layer in self.layout
        }
        self.drop_gradients()
        return gradients

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """This process's rows of a parameter's gradient, copied."""
        assert parameter.grad is not None
        return self._local(parameter.grad).clone()

    # What is saved.

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
            for name, kind in self._kinds.items():
                local = self._local(parameters[name])
                moments = moment_names(self.optimizer_settings, kind)
                self._set_state(name, parameters[name], {moment: torch.zeros_like(local) for moment in moments}, {})
        read(self.tensors())

    def parameter_count(self) -> int:
        """Parameters of the model as it is now, a fading or frozen base included."""
        return sum(self._shape(parameter).numel() for parameter in self.parameters().values())

    def facts(self) -> dict[str, str]:
        """What a user would want to know of how this engine runs here, for the log."""
        return {}
