"""InRank in a training loop that uses ``accelerate``."""

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
"""The kinds of distribution in which each process holds the whole model."""


class AcceleratedRun(LowRankRun):
    """A ``LowRankRun`` whose model and optimizer are prepared by an ``Accelerator``, one process or DDP.

    ``run.model`` and ``run.optimizer`` may be new objects after ``after_step``, and they are prepared as the first ones
    were. Prepare data loaders yourself. Under ``accelerator.accumulate(run.model)``, ``after_step`` does nothing until
    the gradients are synchronised, and neither does ``run.optimizer.step()``. The scheduler is not prepared: it counts
    optimizer steps, so step it where ``accelerator.sync_gradients`` holds.

    Args:
        accelerator: without an FSDP, DeepSpeed or other plugin that shards the model, without ``torch.compile`` and
            without a gradient scaler (``fp16``).
        model, method, optimizer, scheduler, initial, seed, total_steps: as of ``LowRankRun``.

    Raises:
        UserError: also for an accelerator that cannot be used.
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
        """As of ``LowRankRun``; nothing while gradients are being accumulated."""
        return super().after_step(backward) if self._accelerator.sync_gradients else []

    def _forget(self) -> None:
        """Take the last model and optimizer off the accelerator's lists, which would keep their memory alive."""
        old = {id(each) for each in self._prepared}
        for kept in (self._accelerator._models, self._accelerator._optimizers):
            kept[:] = [each for each in kept if id(each) not in old]
        self._prepared.clear()


def refuse_accelerator(accelerator: Accelerator) -> None:
    """Refuse what cannot follow a model whose parameters are replaced.

    Raises:
        UserError: it names the plugin or setting.
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
