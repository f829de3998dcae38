"""What dropout draws: a pure function of seed, step and process, the same as after ``torch.manual_seed``."""

import traceback

import pytest
import torch
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint

from inrank_dist.lowrank.init import generator_for, seed_for
from inrank_dist.train.randomness import seed_step

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason=""))]


def draws(device: torch.device) -> torch.Tensor:
    x = torch.ones(64, 64, device=device, requires_grad=True)
    checkpointed = checkpoint(lambda x: dropout(x, 0.3), x, use_reentrant=False)
    checkpointed.sum().backward()
    return torch.stack([dropout(x, 0.5), torch.rand(64, 64, device=device), checkpointed, x.grad]).detach()


@pytest.mark.parametrize("device", DEVICES)
def test_the_draws_of_a_step_are_those_after_manual_seed(device: torch.device) -> None:
    for step, process_rank in ((0, 0), (1, 0), (1, 3)):
        torch.manual_seed(generator_for(7, "step", step, process_rank).initial_seed())
        expected = draws(device)
        seed_step(7, step, process_rank, device)
        assert torch.equal(draws(device), expected)
        assert torch.equal(expected[2] > 0, expected[3] > 0), "recomputed with the same mask"


def test_steps_and_processes_draw_differently() -> None:
    seen = []
    for arguments in ((7, 1, 0), (7, 2, 0), (7, 1, 1), (8, 1, 0), (7, 1, 0)):
        seed_step(*arguments, CPU)
        seen.append(torch.rand(8))
    assert torch.equal(seen[0], seen[-1])
    assert len({tuple(each.tolist()) for each in seen}) == 4
    assert seed_for(7, "step", 1, 0) == generator_for(7, "step", 1, 0).initial_seed()


def test_seeding_a_step_on_cpu_formats_no_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.manual_seed`` does, for every backend that is not initialised: it looks up every source file on disk."""

    def fail(*args: object) -> list[str]:
        raise AssertionError("a stack was formatted")

    monkeypatch.setattr(traceback, "format_stack", fail)
    seed_step(7, 1, 0, CPU)
