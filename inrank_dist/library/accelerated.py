"""Low-rank training in a loop that uses ``accelerate``."""

from collections.abc import Callable
from typing import Any, NoReturn

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..method.settings import LowRankSettings
from ..runtime.errors import UserError
from .run import Groups, LowRankRun

WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""Distributed types in which each process holds the whole model."""


class AcceleratedRun(LowRankRun):
    """A ``LowRankRun`` whose model and optimizer are prepared by an ``Accelerator``.

    It supports one process and DDP. ``after_step`` may replace ``run.model`` and ``run.optimizer``; the new objects are
    prepared, too. Prepare the data loaders yourself.

    Inside ``accelerator.accumulate(run.model)``, both ``run.optimizer.step()`` and ``after_step`` do nothing until the
    gradients are synchronised. The scheduler is not prepared, because it counts optimizer steps. Call its ``step`` only
    if ``accelerator.sync_gradients`` is true.

    Args:
        accelerator: must not use FSDP, DeepSpeed or another plugin that shards the model, ``torch.compile``, or a
            gradient scaler (``fp16``).
        model, method, optimizer, scheduler, initial, seed, total_steps: as in ``LowRankRun``.

    Raises:
        UserError: if the accelerator is not supported, or for the reasons given in ``LowRankRun``.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: Callable[[], nn.Module],
        method: LowRankSettings,
        optimizer: Callable[[Groups], Optimizer],
        *,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        initial: nn.Module | None = None,
        seed: int = 0,
        total_steps: int | None = None,
    ) -> None:
        refuse_accelerator(accelerator)
        self._accelerator = accelerator
        self._prepared: list[object] = []

        def wrap(module: nn.Module) -> nn.Module:
            wrapped = accelerator.prepare_model(module)
            self._prepared += [module, wrapped]
            return wrapped

        def make_optimizer(groups: Groups) -> Optimizer:
            prepared = accelerator.prepare_optimizer(optimizer(groups))
            self._prepared.append(prepared)
            return prepared

        super().__init__(
            model,
            method,
            make_optimizer,
            parallelize=lambda _: self._forget(),
            wrap=wrap,
            scheduler=scheduler,
            initial=initial,
            seed=seed,
            device=accelerator.device,
            total_steps=total_steps,
        )
        accelerator.register_save_state_pre_hook(_refuse_state)
        accelerator.register_load_state_pre_hook(_refuse_state)

    def after_step(self, backward: Callable[[], object] | None = None) -> list[dict[str, Any]]:
        """Like ``LowRankRun.after_step``, but does nothing while gradients are accumulated."""
        return super().after_step(backward) if self._accelerator.sync_gradients else []

    def _forget(self) -> None:
        """Remove the old model and optimizer from the accelerator's lists, which would keep their memory alive."""
        old = {id(each) for each in self._prepared}
        for kept in (self._accelerator._models, self._accelerator._optimizers):
            kept[:] = [each for each in kept if id(each) not in old]
        self._prepared.clear()


def refuse_accelerator(accelerator: Accelerator) -> None:
    """Reject an accelerator that cannot handle a model whose parameters are replaced.

    Raises:
        UserError: if it has such a plugin or setting, which the message names.
    """
    found = accelerator.distributed_type
    if found not in WHOLE:
        raise UserError(
            f"the accelerator has distributed_type {found.value}, which shards or moves the model itself; write an "
            "Accelerator without that plugin (one process or DDP), or LowRankRun with fully_shard in parallelize"
        )
    if getattr(accelerator, "parallelism_config", None) is not None:
        raise UserError(
            "the accelerator has a parallelism_config; write an Accelerator without it (one process or DDP)"
        )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise UserError(
            "the accelerator compiles the model with torch.compile (dynamo_plugin), which would be compiled anew at "
            "every change of rank; write an Accelerator without it, or LowRankRun with torch.compile in parallelize"
        )
    if accelerator.scaler is not None:
        raise UserError("mixed_precision is fp16, whose gradient scaler knows one optimizer only; write bf16 or no")
    if accelerator.mixed_precision == "fp8":
        raise UserError("mixed_precision is fp8, which replaces layers itself; write bf16 or no")


def _refuse_state(*_: object) -> NoReturn:
    raise UserError(
        "Accelerator.save_state and load_state know no ranks; write run.save(folder) and run.load(folder) instead"
    )
