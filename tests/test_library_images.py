"""InRank on convolutions: a small Wide-ResNet learns scikit-learn's digits with ranks that grow."""

from typing import Any

import pytest
import torch
from images_checks import TARGETS, WideResNet, make_run, train
from pool import Pool
from sharing import slow
from torch import nn

import inrank_dist as inrank
from inrank_dist.lowrank.conv import LowRankConv2d
from inrank_dist.lowrank.layer import LowRankLayer
from inrank_dist.method.settings import LowRankSettings

STEPS, LAYERS = 70, 7


def growing(freeze_step: int = 55, **options: Any) -> LowRankSettings:
    settings = {"initial_rank": 2, "buffer": 4, "interval": 15, "multiple_of": 1, "max_rank_fraction": 1.0}
    return inrank.InRank(TARGETS, freeze_step=freeze_step, **{**settings, "base": "none", **options})


def dense_start(steps: int) -> LowRankSettings:
    return inrank.PretrainThenFactorise(
        TARGETS, steps=steps // 2, total_steps=steps, multiple_of=1, max_rank_fraction=1.0
    )


@pytest.mark.parametrize("choice", ["no base", slow("frozen base"), "dense start"])
def test_a_wide_resnet_learns_digits_with_low_rank_convolutions(choice: str) -> None:
    chosen = {
        "no base": growing,
        "frozen base": lambda: growing(base="frozen"),
        "dense start": lambda: dense_start(STEPS),
    }
    run = make_run(chosen[choice](), STEPS)
    result = train(run, STEPS)
    for name, seen in result["table"].items():
        print(f"{name}: rank {seen['rank']}, null rank {seen['null_rank']}, shape {seen['shape']}")
    assert result["accuracy"] > 0.9
    assert result["actions"][-1] == "freeze" and run.frozen
    assert len(result["ranks"]) == LAYERS
    assert all(isinstance(run.model.get_submodule(name), LowRankConv2d) for name in result["ranks"])
    if choice != "dense start":
        assert "grow" in result["actions"] and min(result["ranks"].values()) > 2
        assert max(result["jumps"]) < 1e-6
        assert all(seen["null_rank"] is not None for seen in result["table"].values())
    assert all(rank < min(result["table"][name]["shape"]) for name, rank in result["ranks"].items())
    torch.testing.assert_close(result["merged"], result["logits"], atol=1e-5, rtol=0)
    assert result["steps"] == {STEPS}, "every parameter has taken every step"
    dense = run.merge()
    assert type(dense) is WideResNet
    assert not any(isinstance(module, LowRankLayer) for module in dense.modules())
    assert any(isinstance(module, nn.Conv2d) and module.stride == (2, 2) for module in dense.modules())


@pytest.mark.parametrize("choice", [slow("no base"), "dense start"])
def test_sharded_over_two_processes_it_is_the_run_of_one(choice: str, pool: Pool) -> None:
    """Both processes see the whole batch. So their batch statistics are those of one process, and the mean of their
    equal gradients is the gradient of one process: the runs can be compared exactly, without SyncBatchNorm. The rows of
    factors, their Grams and the rank events are divided all the same."""
    method = growing(freeze_step=12, interval=4) if choice == "no base" else dense_start(16)
    one = train(make_run(method, 16), 16)
    assert one["actions"][-1] == "freeze"
    for result in pool.run("images_checks:in_processes", method, 16, world_size=2, timeout=200):
        torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(one["losses"]), atol=1e-5, rtol=0)
        assert result["ranks"] == one["ranks"]
        torch.testing.assert_close(result["logits"], one["logits"], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(result["merged"], result["logits"], atol=1e-4, rtol=1e-5)
