"""Factors that read the same input run as one product: the same function, gradients and checkpoints as one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cost_checks import Operations
from runs import small_config, tensor_bytes, train
from torch import Tensor, nn

from inrank_dist.lowrank.convert import LayerLayout, convert, find_targets
from inrank_dist.lowrank.layer import set_base_scale, set_fused
from inrank_dist.lowrank.linear import LowRankLinear
from inrank_dist.lowrank.materialize import materialize
from inrank_dist.models import LanguageModel, ModelSettings, build_model
from inrank_dist.models.layers import read_together

MODELS = {
    "gpt2": ModelSettings(name="gpt2", num_layers=2, num_heads=4, hidden_size=32, max_seq_len=16),
    "llama": ModelSettings(
        name="llama", num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=32, max_seq_len=16, intermediate_size=48
    ),
}


def low_rank(settings: ModelSettings, *, base: bool, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """With another rank in every layer."""
    with torch.device("meta"):
        skeleton = build_model(settings, 61)
    names = find_targets(skeleton, ["all"])
    layout = {name: LayerLayout(2 + index % 5, 2 + index % 5, base) for index, name in enumerate(names)}
    model = convert(skeleton, layout)
    materialize(model, skeleton.initial_values(0).buffer, torch.device("cpu"))
    model.to(dtype)
    set_base_scale(model, 0.5)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def loss_and_gradients(model: LanguageModel, *, joins: bool) -> tuple[Tensor, dict[str, Tensor]]:
    set_fused(model, joins)
    model.zero_grad()
    tokens = torch.arange(32).view(2, 16) % 61
    loss = model(tokens, tokens.roll(1, 1))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_same_function_and_gradients(settings: ModelSettings, base: bool) -> None:
    model = low_rank(settings, base=base)
    loss, gradients = loss_and_gradients(model, joins=True)
    other, others = loss_and_gradients(model, joins=False)
    torch.testing.assert_close(loss, other, rtol=1e-12, atol=0)
    assert gradients.keys() == others.keys()
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_same_in_bfloat16(settings: ModelSettings) -> None:
    """As near to float32 as one by one: factors are cast before they are put together, as each would be by itself."""
    model = low_rank(settings, base=False, dtype=torch.float32)
    exact, truth = loss_and_gradients(model, joins=False)
    errors = []
    for joins in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            loss, gradients = loss_and_gradients(model, joins=joins)
        torch.testing.assert_close(loss, exact, rtol=2e-3, atol=0)
        errors.append(sum(float((gradient - truth[name]).square().sum()) for name, gradient in gradients.items()))
    assert 0 < errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize(("name", "fewer"), [("gpt2", 2), ("llama", 3)])
def test_it_takes_fewer_products(name: str, fewer: int) -> None:
    """In each block q, k and v share one instead of three, gate and up one instead of two; gradients twice as many."""
    counts = []
    for joins in (False, True):
        model = low_rank(MODELS[name], base=False)
        with Operations(torch.ops.aten.mm, torch.ops.aten.addmm) as products:
            loss_and_gradients(model, joins=joins)
        counts.append(products.count)
    assert counts[0] - counts[1] == 3 * 2 * fewer


def test_layers_of_other_kinds_run_one_by_one() -> None:
    x = torch.randn(3, 8)
    layers = [LowRankLinear(8, 4, 2), nn.Linear(8, 4)]
    for parameter in layers[0].parameters():
        nn.init.normal_(parameter)
    for got, layer in zip(read_together(layers, x), layers, strict=True):
        torch.testing.assert_close(got, layer(x))


def test_training_and_checkpoints_are_the_same(corpus: Path, tmp_path: Path) -> None:
    """Same ranks and losses, the same tensors in the checkpoint; and a run goes on in the other form."""
    runs = {}
    for fuse in ("true", "false"):
        config = small_config(corpus, lowrank__fuse=fuse, run__dir=tmp_path / fuse, checkpoint__interval=20)
        runs[fuse] = train(config)
    (recorder, table), (other, others) = runs["true"], runs["false"]
    assert table == others
    assert recorder.losses() == pytest.approx(other.losses(), rel=1e-5)
    tensors = {fuse: tensor_bytes(tmp_path / fuse) for fuse in runs}
    assert {name: len(data) for name, data in tensors["true"].items()} == {
        name: len(data) for name, data in tensors["false"].items()
    }
    longer = small_config(corpus, lowrank__fuse="false", run__dir=tmp_path / "true", train__steps=34)
    resumed, _ = train(longer, resume=True)
    assert len(resumed.losses()) == 4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_growth_compiles_a_handful_of_graphs_and_the_freeze_one_a_layout(corpus: Path) -> None:
    """However often ranks change: 8 layers here take other ranks at each of five events."""
    counts: list[int] = []

    def hook(trainer: Any) -> None:
        after_step = trainer.ranks.after_step

        def counted(step: int, *batch: Any) -> Any:
            if trainer.ranks.due(step):
                counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            return after_step(step, *batch)

        trainer.ranks.after_step = counted

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = small_config(
        corpus, train__compile="true", lowrank__interval=4, lowrank__threshold=0.9999, lowrank__base="none",
        lowrank__init="kaiming", lowrank__measure="product",
    )  # fmt: skip
    recorder, table = train(config, hook=hook)
    after = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    events = [record for record in recorder.records if record["kind"] == "rank_event"]
    assert len(counts) >= 6 and len(events) >= 3
    assert counts[-1] <= 5, "blocks and the loss, once static and once or twice with ranks as symbols"
    assert counts[-1] == counts[1], "no event compiles again"
    assert after - counts[-1] <= config.model.num_layers + 1
    eager, same = train(small_config(
        corpus, lowrank__interval=4, lowrank__threshold=0.9999, lowrank__base="none",
        lowrank__init="kaiming", lowrank__measure="product",
    ))  # fmt: skip
    assert same == table
    assert recorder.losses() == pytest.approx(eager.losses(), rel=1e-4)
