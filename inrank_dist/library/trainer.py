"""Low-rank training with the ``Trainer`` of ``transformers``."""

import copy
import gc
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..lowrank.layer import LowRankLayer
from ..lowrank.materialize import copied_to
from ..method.settings import LowRankSettings
from ..optim.moments import check_state
from ..runtime.errors import UserError
from .accelerated import refuse_accelerator
from .run import Groups, LowRankRun

STATE_FILE = "inrank.safetensors"
"""Name of the file that the callback adds to a Trainer's checkpoint."""


class InRankCallback(TrainerCallback):
    """A callback that trains the model of a ``Trainer`` with low-rank layers.

    Pass it a ``Trainer`` (or an instance of a subclass). The callback adds itself to the Trainer's callbacks::

        trainer = Trainer(model=model, args=args, train_dataset=data)
        grown = InRankCallback(trainer, InRank(["mlp"], freeze_step=1000))
        trainer.train()
        grown.merge().save_pretrained("dense")

    The constructor replaces the target layers and creates the optimizer with the Trainer's ``create_optimizer``. The
    model, its DDP wrapper and the prepared optimizer keep their identity. A rank event replaces their contents, so the
    Trainer's loop, accelerator, scheduler and other callbacks need no change.

    The method initialises the factored layers. All other layers keep the values of the model in process 0.

    A checkpoint of the Trainer contains the merged dense model, which ``from_pretrained`` can load, and the factors and
    ranks in ``inrank.safetensors``. To resume, pass ``resume_from_checkpoint`` both here and to ``trainer.train``.

    Args:
        trainer: a Trainer that runs on one process or with DDP.
        method: as in ``LowRankRun``. ``growth_init`` and ``outer_init`` cannot be ``gradient``.
        seed: seed of the initial values and of new modes. Defaults to the seed in the Trainer's arguments.
        total_steps: as in ``LowRankRun``. Defaults to ``max_steps`` of the Trainer's arguments if that is set.
        resume_from_checkpoint: a checkpoint folder, or True for the latest one in ``output_dir``.

    Attributes:
        run: the ``LowRankRun``, which provides ``run.ranks`` and ``run.table()``.

    Raises:
        UserError: if a setting of the Trainer is not supported, the model was loaded from pretrained weights that the
            method would discard, or the checkpoint cannot be resumed.
    """

    run: LowRankRun

    def __init__(
        self,
        trainer: Trainer,
        method: LowRankSettings,
        *,
        seed: int | None = None,
        total_steps: int | None = None,
        resume_from_checkpoint: str | Path | bool | None = None,
    ) -> None:
        _refuse(trainer, method)
        self._trainer = trainer
        self._model = cast(Any, trainer.model)
        self._prepared: AcceleratedOptimizer | None = None
        self._wrapper: DistributedDataParallel | None = None
        self._restored = False
        checkpoint = _checkpoint(trainer, resume_from_checkpoint)
        loaded_from = getattr(self._model, "name_or_path", "")
        if loaded_from and not method.dense_fraction and checkpoint is None:
            raise UserError(
                f"the model was loaded from {loaded_from}, and the method would start its target layers anew; write "
                "PretrainThenFactorise(...), which keeps their weights, or a model made from its config"
            )
        _broadcast(self._model)
        self.run = LowRankRun(
            lambda: copied_to(self._model, "meta"),
            method,
            self._make_optimizer,
            parallelize=self._adopt,
            wrap=self._rewrap,
            initial=copied_to(self._model, "cpu"),
            seed=trainer.args.seed if seed is None else seed,
            device=trainer.args.device,
            total_steps=trainer.args.max_steps if total_steps is None and trainer.args.max_steps > 0 else total_steps,
        )
        if not check_state(self.run.optimizer):
            raise UserError(
                f"what {type(self.run.optimizer).__name__} keeps of each parameter cannot be found out; write "
                "optim: adamw_torch, or another optimizer whose class takes its defaults as arguments"
            )
        if checkpoint is not None:
            self.run.load_state_dict(load_file(checkpoint / STATE_FILE))
            self._restored = True
        trainer.optimizer = self.run.optimizer
        self._model.register_load_state_dict_pre_hook(self._before_loading)
        self._model.save_pretrained = self._save_pretrained
        trainer.add_callback(self)

    def merge(self) -> PreTrainedModel:
        """Return the dense model on the CPU, with each product of factors merged into one weight."""
        dense: Any = self.run.merge()
        for name in ("config", "generation_config"):  # may have changed since construction
            if hasattr(dense, name):
                setattr(dense, name, copy.deepcopy(getattr(self._model, name)))
        return dense

    def _mean_rank(self) -> float:
        return sum(self.run.ranks.values()) / len(self.run.ranks)

    # Called by the Trainer.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer
        if state.global_step != self.run.step:
            raise UserError(
                f"the Trainer is at step {state.global_step} and the ranks are at step {self.run.step}; make a new "
                "Trainer, and write the same resume_from_checkpoint in InRankCallback and in trainer.train"
            )
        prepared = trainer.optimizer
        if trainer.model is not self._model or getattr(prepared, "optimizer", None) is not self.run.optimizer:
            raise UserError(
                "the Trainer has another model or optimizer than InRankCallback; leave both to the callback"
            )
        assert isinstance(prepared, AcceleratedOptimizer)
        self._prepared = prepared
        wrapped = trainer.model_wrapped
        self._wrapper = wrapped if isinstance(wrapped, DistributedDataParallel) else None
        self._restored = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for record in self.run.after_step():
            if record["kind"] == "rank_event":
                due = control.should_log
                self._trainer.log(
                    {f"inrank/{record['action']}": len(record["layers"]), "inrank/rank": self._mean_rank()}
                )
                control.should_log = due  # log() clears it, which would drop the record of this step's loss

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.should_save and not args.save_only_model:
            folder = Path(self._trainer._get_output_dir(None)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            tensors = {name: tensor.contiguous() for name, tensor in self.run.state_dict().items()}
            save_file(tensors, folder / STATE_FILE)

    # Called by the run at construction and at each rank event.

    def _adopt(self, module: nn.Module) -> None:
        """Release the old contents of the persistent objects, and give the Trainer's model those of ``module``."""
        if self._prepared is not None:
            self._prepared.optimizer = None
        if self._wrapper is not None:
            del self._wrapper.reducer, self._wrapper.logger
            self._wrapper._module_parameters = []
        for contents in ("_modules", "_parameters", "_buffers"):
            # Share the dictionaries, because the run replaces the parameters in them later.
            vars(self._model)[contents] = vars(module)[contents]
        gc.collect()

    def _make_optimizer(self, groups: Groups) -> Optimizer:
        """Create the Trainer's optimizer for the new parameters of the model."""
        trainer, prepared = self._trainer, self._prepared
        trainer.optimizer = None
        optimizer = trainer.create_optimizer()
        if prepared is not None:
            prepared.optimizer = optimizer
            trainer.optimizer = prepared
        return optimizer

    def _rewrap(self, module: nn.Module) -> nn.Module:
        """Give the persistent DDP wrapper the attributes of a new one.

        The reducer of DDP refers to the parameters by identity, so it cannot be kept.
        """
        old = self._wrapper
        if old is None:
            return self._model
        handler = self._trainer.accelerator.ddp_handler
        options = handler.to_kwargs() if handler is not None else {}
        new = DistributedDataParallel(
            self._model, device_ids=old.device_ids, output_device=old.output_device, **options
        )
        if handler is not None:
            handler.register_comm_hook(new)
        vars(new)["_is_accelerate_prepared"] = (
            True  # set by Accelerator.prepare_model, which would otherwise wrap it again
        )
        old.__dict__ = new.__dict__
        return old

    # Called by the Trainer through the model.

    def _save_pretrained(self, save_directory: str | Path, state_dict: object = None, **options: Any) -> None:
        """Save the merged model, because ``from_pretrained`` cannot load factors."""
        self.merge().save_pretrained(save_directory, **options)

    def _before_loading(self, module: nn.Module, state_dict: dict[str, Any], *_: object) -> None:
        """Protect the factors from the dense weights of a checkpoint, which the Trainer loads with ``strict=False``."""
        if self._restored:
            state_dict.clear()
            state_dict.update(module.state_dict())  # already restored from STATE_FILE at construction
        missing = [
            f"{name}.U"
            for name, layer in module.named_modules()
            if isinstance(layer, LowRankLayer) and f"{name}.U" not in state_dict
        ]
        if missing:
            raise UserError(
                f"these weights hold no {missing[0]}; to continue from a checkpoint write resume_from_checkpoint in "
                "InRankCallback as well"
            )


def _refuse(trainer: Trainer, method: LowRankSettings) -> None:
    """Reject settings of a Trainer that do not work with a model whose layers are replaced."""
    refuse_accelerator(trainer.accelerator)
    args = trainer.args
    for name in (
        "activation_checkpointing",
        "gradient_checkpointing",
        "auto_find_batch_size",
        "use_liger_kernel",
        "neftune_noise_alpha",
        "load_best_model_at_end",
        "enable_jit_checkpoint",
        "torch_compile",
        "fsdp",
        "deepspeed",
        "debug",
    ):
        if getattr(args, name, None):
            raise UserError(
                f"the Trainer's {name} is {getattr(args, name)!r}, which InRankCallback cannot follow; leave {name} "
                "out, or write a training loop with LowRankRun"
            )
    if args.n_gpu > 1:
        raise UserError(
            f"the Trainer uses {args.n_gpu} GPUs in one process (DataParallel); write torchrun, one GPU each"
        )
    if trainer.model_init is not None:
        raise UserError("the Trainer has model_init, which makes a new model in train(); write model=...")
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise UserError(
            "the Trainer has optimizers=(...), which hold the dense parameters; write optim or optimizer_cls_and_kwargs"
        )
    if getattr(trainer, "is_model_parallel", False) or getattr(trainer.model, "quantization_method", None):
        raise UserError("the model is quantized or on several devices (device_map); write a model on one device")
    if not isinstance(trainer.model, PreTrainedModel):
        raise UserError(
            f"the Trainer's model is a {type(trainer.model).__name__}; write a transformers PreTrainedModel"
        )
    for name in ("growth_init", "outer_init"):
        if getattr(method, name) == "gradient":
            raise UserError(
                f"{name} is gradient, which needs the batch once more, and the Trainer hands it to no callback; write "
                f"{name}='random', or a training loop with LowRankRun"
            )


def _checkpoint(trainer: Trainer, asked: str | Path | bool | None) -> Path | None:
    """Return the checkpoint folder to resume from, or None."""
    if asked is None or asked is False:
        return None
    output = trainer.args.output_dir
    found = get_last_checkpoint(output) if asked is True else str(asked)
    if found is None:
        raise UserError(f"resume_from_checkpoint is True and {output} holds no checkpoint; write the folder of one")
    if not (Path(found) / STATE_FILE).is_file():
        raise UserError(
            f"resume_from_checkpoint is {found}, which holds no {STATE_FILE}; write a checkpoint of a Trainer with "
            "InRankCallback, without save_only_model"
        )
    return Path(found)


def _broadcast(model: nn.Module) -> None:
    """Broadcast the model from process 0, as DDP does later, because the initial factors may depend on its values."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor, 0)
