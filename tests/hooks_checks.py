"""What test_library_hooks.py does in each process: the Trainer of transformers, and a loop with accelerate."""

import gc
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from library_checks import BATCH, MODELS, logits_of, method, whole_batch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

import inrank_dist as inrank

STEPS = 12


class Rows(Dataset):
    """The batches of ``whole_batch``, row by row."""

    def __init__(self) -> None:
        self.rows = torch.cat([whole_batch(step) for step in range(STEPS)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


@contextmanager
def one_of(world_size: int) -> Iterator[None]:
    """A place for accelerate, whose state is one object a process and which leaves variables in the environment."""
    environment = dict(os.environ)
    if world_size > 1:
        dist.init_process_group("gloo")
    else:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(environment)
        if dist.is_initialized():
            dist.destroy_process_group()


def arguments(folder: Path | str, world_size: int = 1, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": BATCH // world_size,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "max_steps": STEPS,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "log_level": "error",
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def make_model(name: str, seed: int = 5) -> Any:
    torch.manual_seed(seed)
    model: Any = MODELS[name][0]()
    model.loss_type = "ForCausalLM"  # else the Trainer counts labels of GPT-2 that have no target
    return model


def make_trainer(name: str, folder: Path | str, world_size: int = 1, model_seed: int = 5, **options: Any) -> Trainer:
    return Trainer(
        model=make_model(name, model_seed),
        args=arguments(folder, world_size, **options),
        train_dataset=Rows(),
        eval_dataset=Rows(),
    )


def outcome(model: Any, run: inrank.LowRankRun, losses: list[float], dense: Any) -> dict[str, Any]:
    probe = whole_batch(999)
    model.eval()
    return {
        "losses": losses,
        "ranks": run.ranks,
        "logits": logits_of(model, probe),
        "merged": logits_of(dense.eval(), probe),
        "lr": run.optimizer.param_groups[0]["lr"],
    }


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_trainer(
    name: str,
    folder: Path | str,
    world_size: int = 1,
    resume: str | None = None,
    choice: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train with the Trainer."""
    with one_of(world_size):
        # Processes start from different models, as those of a user who sets no seed.
        seed = 5 + int(os.environ.get("RANK", 0)) if world_size > 1 else 5
        trainer = make_trainer(name, folder, world_size, seed, **options)
        model = trainer.model
        chosen = method(MODELS[name][1], **(choice or {}))
        callback = inrank.InRankCallback(trainer, chosen, resume_from_checkpoint=resume)
        started, frozen = weakref.ref(next(model.parameters())), callback.run.frozen
        trainer.train(resume_from_checkpoint=resume)
        gc.collect()
        assert trainer.model is model
        assert frozen or started() is None, "parameters of earlier ranks are kept alive"
        evaluated = trainer.evaluate()["eval_loss"]
        return {**outcome(model, callback.run, losses_of(trainer), callback.merge()), "evaluated": evaluated}


def in_processes(*values: Any) -> dict[str, Any]:
    name, folder, world_size, resume, choice, options = values
    return by_trainer(name, folder, world_size, resume, choice, **options)


def by_hand(name: str, **choice: Any) -> dict[str, Any]:
    """The same run with LowRankRun: the Trainer's optimizer, learning rates, and clipping."""
    initial = make_model(name)
    run = inrank.LowRankRun(
        MODELS[name][0],
        method(MODELS[name][1], **choice),
        lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0),
        scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: 1 - step / STEPS),
        initial=initial,
        seed=3,
        total_steps=STEPS,
    )
    losses = []
    while run.step < STEPS:
        run.model.train()
        ids = whole_batch(run.step)
        loss = run.model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        assert run.scheduler is not None
        run.scheduler.step()
        run.after_step()
        losses.append(loss.item())
    return outcome(run.model, run, losses, run.merge())


def by_accelerate(name: str, world_size: int = 1, pieces: int = 1, **choice: Any) -> dict[str, Any]:
    """The same run in a loop with accelerate, each batch in ``pieces``."""
    with one_of(world_size):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=pieces)
        run = inrank.AcceleratedRun(
            accelerator,
            MODELS[name][0],
            method(MODELS[name][1], **choice),
            lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0),
            scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: 1 - step / STEPS),
            initial=make_model(name),
            seed=3,
            total_steps=STEPS,
        )
        loader = accelerator.prepare(DataLoader(Rows(), batch_size=BATCH // world_size // pieces))
        losses, parts = [], []
        for batch in loader:
            with accelerator.accumulate(run.model):
                run.model.train()
                loss = run.model(**batch).loss
                accelerator.backward(loss)
                parts.append(loss.detach())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(run.model.parameters(), 1.0)
                    assert run.scheduler is not None
                run.optimizer.step()
                if accelerator.sync_gradients:
                    run.scheduler.step()
                run.optimizer.zero_grad()
                run.after_step()
                if accelerator.sync_gradients:
                    losses.append(float(accelerator.reduce(torch.stack(parts).mean(), "mean")))
                    parts = []
        assert run.step == STEPS
        # Nothing of earlier ranks is kept alive.
        assert len(accelerator._models) == 1 and len(accelerator._optimizers) == 1
        return outcome(run.model, run, losses, run.merge())
