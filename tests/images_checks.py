"""What test_library_images.py does in each process: a small Wide-ResNet on scikit-learn's digits."""

import functools
from functools import partial
from typing import Any

import torch
from library_checks import shard
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import inrank_dist as inrank
from inrank_dist.method.settings import LowRankSettings
from inrank_dist.runtime.context import Context
from inrank_dist.theory import low_rank_conv
from inrank_dist.theory.low_rank_conv import WideResNet

BATCH, HELD_OUT = 64, 357
TARGETS = [r"blocks\.\d+\.(first|second|shortcut)$"]


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Images ``(n, 1, 8, 8)`` and labels, in an order of no meaning."""
    images, labels = low_rank_conv.digits()
    return images.float(), labels


def batch(step: int) -> tuple[Tensor, Tensor]:
    images, labels = digits()
    chosen = torch.randint(len(labels) - HELD_OUT, (BATCH,), generator=torch.Generator().manual_seed(step))
    return images[chosen], labels[chosen]


def make_run(method: LowRankSettings, steps: int, world_size: int = 1) -> inrank.LowRankRun:
    return inrank.LowRankRun(
        lambda: WideResNet(((16, 1), (32, 2))),
        method,
        lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.01),
        parallelize=partial(shard, world_size=world_size) if world_size > 1 else None,
        scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: 1 - step / steps),
        seed=1,
        total_steps=steps,
    )


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the running statistics of batch normalisation."""
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "norm" in name}


def logits_of(model: nn.Module) -> Tensor:
    """Of the held-out images, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return model(digits()[0][-HELD_OUT:])


def train(run: inrank.LowRankRun, steps: int) -> dict[str, Any]:
    """Train on whole batches, the same in every process; what growth moved, relative to the largest logit."""
    losses, jumps, actions = [], [], []
    while run.step < steps:
        run.model.train()
        images, labels = batch(run.step)
        loss = nn.functional.cross_entropy(run.model(images), labels)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        assert run.scheduler is not None
        run.scheduler.step()
        losses.append(loss.item())
        due = run._controller.due(run.step + 1)
        before = (logits_of(run.model), statistics(run.model)) if due else None
        ranks = run.ranks
        for record in run.after_step():
            if record["kind"] == "rank_event" and before is not None:
                actions.append(record["action"])
                for name, buffer in statistics(run.model).items():
                    assert torch.equal(buffer, before[1][name]), f"{name} was not carried over"
                if record["action"] == "grow":
                    assert any(run.ranks[name] > rank for name, rank in ranks.items())
                    jumps.append(float((logits_of(run.model) - before[0]).abs().max() / before[0].abs().max()))
    logits = logits_of(run.model)
    return {
        "losses": losses,
        "jumps": jumps,
        "actions": actions,
        "ranks": run.ranks,
        "table": run.table(),
        "logits": logits,
        "merged": logits_of(run.merge()),
        "accuracy": float((logits.argmax(1) == digits()[1][-HELD_OUT:]).float().mean()),
        "steps": {float(state["step"]) for state in run.optimizer.state.values()},
    }


def in_processes(method: LowRankSettings, steps: int) -> dict[str, Any]:
    """A run sharded over the processes of the pool."""
    context = Context()
    context.start(60)
    try:
        return train(make_run(method, steps, context.world_size), steps)
    finally:
        context.stop()
