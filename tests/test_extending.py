"""A layer kind, a method, an allocation, an optimizer and a callback from outside: one line in a registry each."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import short_config, small_config, train
from torch import Tensor, nn

import inrank_dist as inrank
from inrank_dist.data import prepare
from inrank_dist.lowrank.allocation import ALLOCATIONS, Allocation
from inrank_dist.lowrank.criterion import Decision
from inrank_dist.lowrank.kinds import KINDS
from inrank_dist.lowrank.layer import LayerKind, LowRankLayer
from inrank_dist.method.rank_method import METHODS, RankMethod
from inrank_dist.optim.registry import OPTIMIZERS, OptimizerEntry
from inrank_dist.runtime.context import Context
from inrank_dist.runtime.errors import UserError
from inrank_dist.train import Callback, build
from inrank_dist.train.checkpoint import find_checkpoint
from inrank_dist.train.monitors import Monitors


class HalfRank(RankMethod):
    """Freezes every layer at half of the modes that it has."""

    freezes = True

    def final_ranks(self, product: Mapping[str, Tensor], decisions: Mapping[str, Decision]) -> dict[str, int]:
        return {name: len(sigma) // 2 for name, sigma in product.items()}


class Lion(torch.optim.Optimizer):
    """Sign of a momentum (arXiv 2302.06675); its state has torch's name for a first moment."""

    def __init__(self, groups: Any, lr: float, beta: float) -> None:
        super().__init__(groups, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state.setdefault("exp_avg", torch.zeros_like(parameter)).lerp_(parameter.grad, 1 - group["beta"])
                parameter.sub_(state["exp_avg"].sign(), alpha=group["lr"])


class Scaled(nn.Module):
    """A linear layer whose output is doubled."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size) / size**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * nn.functional.linear(x, self.weight)


class LowRankScaled(LowRankLayer):
    def read(self, x: Tensor) -> Tensor:
        return x @ self.V

    def write(self, inner: Tensor) -> Tensor:
        return 2 * inner @ self.U.T

    def through_base(self, x: Tensor) -> Tensor:
        assert self.base is not None
        return 2 * nn.functional.linear(x, self.base)


class ScaledKind(LayerKind[Scaled]):
    dense = Scaled

    def shape(self, module: Scaled) -> tuple[int, int]:
        return module.weight.shape[0], module.weight.shape[1]

    def make(self, module: Scaled, modes: int, base: bool) -> LowRankLayer:
        return LowRankScaled(self.shape(module), modes, bias=False, base=base, device="meta", dtype=module.weight.dtype)


@pytest.fixture
def registered() -> Iterator[None]:
    METHODS["half"] = HalfRank
    OPTIMIZERS["lion"] = OptimizerEntry(Lion, lambda s: {"lr": s.lr, "beta": s.beta1}, lambda s: ("exp_avg",))
    KINDS[Scaled] = ScaledKind()
    ALLOCATIONS["thrice"] = Allocation(lambda layers, multiple_of, budget, seed: dict.fromkeys(layers, 3))
    yield
    del METHODS["half"], OPTIMIZERS["lion"], KINDS[Scaled], ALLOCATIONS["thrice"]


class Count(Callback):
    """Counts steps, and goes on counting after a resume."""

    name = "count"

    def __init__(self) -> None:
        self.steps, self.ended = 0, False

    def on_step_end(self, trainer: Any, verdict: Any, rate: float, records: list[dict[str, Any]]) -> None:
        self.steps += 1

    def on_end(self, trainer: Any) -> None:
        self.ended = True

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]


def test_a_callback_sees_a_run_and_keeps_its_state(registered: None, corpus: Path, tmp_path: Path) -> None:
    config = short_config(
        corpus, run__dir=tmp_path, checkpoint__interval=5, checkpoint__keep=9, lowrank__final="thrice"
    )
    data, context = prepare(config.data, config.tokenizer, config.model.max_seq_len, progress=False), Context()
    first = Count()
    trainer = build(config, context, data, callbacks=[first])
    trainer.run(Monitors())
    assert first.ended and first.steps == config.train.steps
    assert {layer.rank for layer in trainer.engine.layout.values()} == {3}
    second = Count()
    checkpoint = find_checkpoint(config.run.folder, 5)
    resumed = build(config, context, data, checkpoint, callbacks=[second])
    assert second.steps == resumed.step == 5
    with pytest.raises(ValueError, match="two callbacks have the same name"):
        build(config, context, data, callbacks=[Count(), Count()])


def test_the_trainer_knows_a_new_method_and_a_new_optimizer(registered: None, corpus: Path, tmp_path: Path) -> None:
    config = small_config(
        corpus,
        run__dir=tmp_path,
        lowrank__mode="half",
        lowrank__multiple_of=1,
        optimizer__name="lion",
        optimizer__lr=1e-3,
    )
    events = [record for record in train(config)[0].records if record["kind"] == "rank_event"]
    frozen = next(event for event in events if event["action"] == "freeze")["layers"]
    assert frozen and all(0 < change["to"] < 24 for change in frozen.values())
    for record in events:
        for name, change in record["layers"].items():
            assert change["null_rank"] is not None, name


def test_a_name_that_is_not_registered_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lowrank\.mode is half; write one of full, fixed, inrank, efficient"):
        small_config(corpus, run__dir=tmp_path, lowrank__mode="half")
    with pytest.raises(UserError, match=r"optimizer\.name is lion; write one of adamw, sgd, muon, spectron, lora_muon"):
        small_config(corpus, run__dir=tmp_path, optimizer__name="lion")


def test_the_library_knows_a_new_layer_kind(registered: None) -> None:
    run = inrank.LowRankRun(
        lambda: nn.Sequential(Scaled(12), nn.Tanh(), Scaled(12)),
        inrank.InRank([r"^[02]$"], initial_rank=2, buffer=3, interval=2, freeze_step=6, base="none", multiple_of=1),
        lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    )
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    for _ in range(8):
        (run.model(x) - x).square().mean().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.after_step()
    assert run.frozen and max(run.ranks.values()) > 2
    dense = run.merge()
    assert isinstance(dense, nn.Sequential) and type(dense[0]) is Scaled
    torch.testing.assert_close(dense(x), run.model(x), atol=1e-5, rtol=0)
