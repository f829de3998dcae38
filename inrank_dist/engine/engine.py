"""Engine of the trainer: gradient accumulation, clipping and optimizer steps, on one process, with DDP or FSDP2."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ..lowrank.convert import Layout
from ..lowrank.cores import product_gradients
from ..lowrank.division import Processes
from ..lowrank.layer import core_index, set_activation, set_fused
from ..lowrank.spectrum import Factors, gram_matrices
from ..models import LanguageModel
from ..optim import (
    HeldRows,
    OptimizerSettings,
    build_optimizer,
    decayed_parameters,
    parameter_roles,
)
from ..runtime.context import Context
from .checkpointable import CheckpointableModel
from .options import BuildOptions
from .parallelize import checkpoint_blocks, compile_blocks, shard_blocks, shard_mesh
from .placement import RowPlacement, local_rows
from .reshapable import Values

Batches = Sequence[tuple[Tensor, Tensor]]
"""Micro-batches as pairs of inputs and targets, each ``(B, T)`` int64."""


class Engine(CheckpointableModel):
    """Language model in one process, replicated (DDP), or sharded by rows (FSDP2).

    Attributes:
        bad_gradient: whether this process computed a gradient that is not finite (inf or nan) in the last
            ``accumulate``. A bool scalar on the device.

    Args:
        skeleton: dense model on ``meta``. It is not modified.
        layout: the low-rank layers at initialisation.
        values: initial values of the parameters. None: zeros, to be filled by ``restore``.
        context: the distributed job and this process's device.
        optimizer: settings of the optimizer.
        options: precision, compilation and gradient handling.
        name: name of the engine.
        shard_size: with fsdp, number of processes that share one replica of the model. None: all.
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
        name: Literal["local", "ddp", "fsdp"] = "local",
        shard_size: int | None = None,
    ) -> None:
        self.context, self.name, self.plan = context, name, skeleton.plan
        self.optimizer_settings, self.options = optimizer, options
        self.mesh = shard_mesh(context.device.type, context.world_size, shard_size) if name == "fsdp" else None
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
        # Computed before sharding, because ZeRO-3 replaces the shapes of parameters.
        self._roles = parameter_roles(module, self.plan.block_modules(module), self.optimizer_settings)
        self._decayed = decayed_parameters(module, factors=self.options.frobenius_decay == 0)
        scale = self.options.outer_lr_scale
        outer = [f"{name}.{leaf}" for name, each in layout.items() if each.depth > 2 for leaf in ("U", "V")]
        self._lr_scales = dict.fromkeys(outer, scale) if scale != 1 else {}
        set_fused(module, self.options.fuse)
        set_activation(module, self.options.activation)
        if self.options.activation_checkpointing:
            checkpoint_blocks(module, self.plan)
        if self.options.compile:
            growing = any(layer.modes > layer.rank for layer in layout.values())
            if self._compiled_for_growth and not growing:
                torch.compiler.reset()  # free the code compiled for dynamic ranks
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
            # Newer versions of torch call it forward_sync_buffers. The oldest supported one has only this name.
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
        return build_optimizer(
            parameters,
            self._roles,
            self._decayed,
            self.optimizer_settings,
            rows=rows,
            lr_scales=self._lr_scales,
            **options,
        )

    @property
    def _uniform_placement(self) -> RowPlacement:
        """Return the placement of any parameter, since the engine places all of them alike."""
        return next(iter(self._placements.values()))

    # One optimizer step.

    def accumulate(self, batches: Batches, tokens: int, *, training: bool = True) -> Tensor:
        """Run the forward and backward passes of this process's share of a global batch.

        Args:
            batches: micro-batches of this process.
            tokens: number of tokens in the global batch, by which gradients are divided.
            training: whether the model is in training mode, with dropout.

        Returns:
            The loss in nats, summed over the tokens of this process: a float32 scalar on the device. The host does not
            synchronise with the device.
        """
        self.model.train(training)
        self.bad_gradient.zero_()
        total = torch.zeros((), device=self.device)
        for index, (inputs, targets) in enumerate(batches):
            with self._accumulating(last=index == len(batches) - 1):
                loss = self.loss(inputs, targets)
                # Gradients are averaged over processes. Multiply by their number to obtain the sum.
                self._backward(loss * (self.context.world_size / tokens))
            total += loss.detach()
        if training and self.options.frobenius_decay > 0 and self.options.frobenius_in_loss:
            self._add_product_gradients(self.options.frobenius_decay)
        return total

    def _accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Return the context of one micro-batch.

        DDP reduces gradients in the last one only. FSDP2 does so unless ``reduce_each_micro_batch`` is set.
        """
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last or self.options.reduce_each_micro_batch)
            # All-reduce over replicas once per step: they need only the sum over all micro-batches.
            self.module.set_requires_all_reduce(last)
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of one micro-batch in the current mode of the model (train or eval).

        Args:
            inputs, targets: ``(B, T)`` int64 token IDs, on any device.

        Returns:
            The loss in nats, summed over tokens: a scalar on the device.
        """
        inputs, targets = (t.to(self.device, non_blocking=True) for t in (inputs, targets))
        if self.options.cuda_graph:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            loss: Tensor = self.model(inputs, targets)
        return loss

    def logits(self, inputs: Tensor) -> Tensor:
        """Compute logits ``(B, T, vocabulary)`` of token IDs ``(B, T)``. All processes must call it together."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            logits: Tensor = self.model(inputs.to(self.device))
        return logits

    def _observe(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        """Forward hook that checks whether the gradient of a module's output is finite.

        The check is local to this process. After the reduction, the process with the bad gradient can no longer be
        identified.
        """
        if output.requires_grad:
            output.register_hook(self._note)

    def _note(self, gradient: Tensor) -> None:
        self.bad_gradient.logical_or_(~gradient.detach().isfinite().all())

    def _sum_over_shards(self, tensor: Tensor) -> None:
        """All-reduce in place over the processes that hold the shards of one replica."""
        self._uniform_placement.sum_over_shards(tensor)

    @torch.no_grad()
    def gradient_norm(self) -> tuple[Tensor, Tensor]:
        """Compute the gradient norm.

        Returns:
            The norm over all parameters, and the norm over this process's shards. Both are float32 scalars on the
            device.
        """
        local = torch.nn.utils.get_total_norm(self._gradients()).to(self.device)
        norm = local.square()
        self._sum_over_shards(norm)
        return norm.sqrt(), local

    @torch.no_grad()
    def step(self, lr: float, norm: Tensor) -> None:
        """Clip the gradients, take an optimizer step and clear the gradients.

        Args:
            lr: learning rate of this step.
            norm: gradient norm over all parameters, from ``gradient_norm``.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if self.options.frobenius_decay > 0 and not self.options.frobenius_in_loss:
            self._decay_products(lr * self.optimizer_settings.matrix_scale * self.options.frobenius_decay)
        clip = self.options.grad_clip
        self._move((clip / (norm + 1e-6)).clamp(max=1.0) if clip > 0 else None)
        self.optimizer_steps += 1

    def _move(self, scale: Tensor | None) -> None:
        """Multiply the gradients by ``scale``, take an optimizer step and clear the gradients."""
        if scale is not None:
            torch._foreach_mul_(self._gradients(), scale)
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Clear the gradients without an optimizer step."""
        self.optimizer.zero_grad()

    def _gradients(self) -> list[Tensor]:
        return [self._local(p.grad) for p in self.parameters().values() if p.grad is not None]

    def _decay_products(self, rate: float) -> None:
        """Apply Frobenius decay, a step along the gradient of ``|U V^T|_F^2 / 2`` (arXiv 2209.13569).

        ``U -= rate * U (V^T V)`` and ``V -= rate * V (U^T U)``; for deep layers see ``cores.product_gradients``.
        """
        parameters = self.parameters()
        for name, gradient in self._product_gradients():
            self._local(parameters[name]).sub_(rate * self._lr_scales.get(name, 1.0) * gradient)

    @torch.no_grad()
    def _add_product_gradients(self, strength: float) -> None:
        """Add the gradient of ``strength * |U V^T|_F^2 / 2`` to this process's rows of the gradients of all factors."""
        parameters = self.parameters()
        for name, rows in self._product_gradients():
            gradient = parameters[name].grad
            assert gradient is not None
            self._local(gradient).add_(rows, alpha=strength)

    def _product_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each trained factor, and this process's rows of the gradient of ``|U V^T|_F^2 / 2``."""
        factors, parameters = self.factors(), self.parameters()
        grams = gram_matrices(factors, self.context.sum)
        for layer, held in self.held_rows(self.layout).items():
            cores = factors[layer].cores
            for leaf, gradient in product_gradients(Factors(held.U, held.V, cores), grams[layer]).items():
                name = f"{layer}.{leaf}"
                if not parameters[name].requires_grad:
                    continue
                if core_index(leaf):
                    gradient = gradient[slice(*self._placements[name].rows(len(gradient)))].to(held.U.dtype)
                yield name, gradient

    def factor_gradients(self, batches: Batches, tokens: int) -> dict[str, Factors]:
        """Compute the gradients of all factors on a global batch, without dropout and without an optimizer step.

        Args:
            batches, tokens: as in ``accumulate``.

        Returns:
            This process's rows of the gradients, by layer.
        """
        self.accumulate(batches, tokens, training=False)
        gradients = self._factor_gradients()
        self.drop_gradients()
        return gradients

    def facts(self) -> dict[str, str]:
        """Return facts about how the engine runs on this machine, for the log."""
        return {}
