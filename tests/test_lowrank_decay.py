"""Frobenius decay: the gradient of ``|U V^T|_F^2 / 2`` from Grams alone (arXiv 2209.13569), and in the engine."""

from typing import Any

import pytest
import reference
import torch

from inrank_dist.engine.engine import Engine
from inrank_dist.engine.options import BuildOptions
from inrank_dist.lowrank.convert import LayerLayout
from inrank_dist.lowrank.spectrum import Factors, gram_matrices
from inrank_dist.models import ModelSettings, build_model
from inrank_dist.optim import OptimizerSettings
from inrank_dist.runtime.context import Context


def half_square(W: torch.Tensor) -> torch.Tensor:
    return W.square().sum() / 2


@pytest.mark.parametrize(("out", "in_", "R"), [(20, 15, 4), (15, 20, 4), (6, 6, 6), (30, 10, 1)])
def test_gradient_needs_the_grams_only(out: int, in_: int, R: int) -> None:
    U, V = reference.normal(out, R, 0).double(), reference.normal(in_, R, 1).double()
    grams = gram_matrices({"layer": Factors(U, V)}, reference.alone)["layer"]
    expected = reference.gradients(U, V, half_square)
    assert torch.allclose(U @ grams.V, expected[0], rtol=1e-12, atol=1e-12)
    assert torch.allclose(V @ grams.U, expected[1], rtol=1e-12, atol=1e-12)


def test_gradient_on_three_uneven_shards() -> None:
    """Each process has the rows of the gradient that it has of the factor, after one all-reduce of the Grams."""
    U, V = reference.normal(23, 5, 0).double(), reference.normal(17, 5, 1).double()
    rows = [reference.cut(len(factor), 3, seed) for seed, factor in ((3, U), (4, V))]
    assert len({len(range(*each.indices(23))) for each in rows[0]}) > 1

    def process(index: int, all_reduce: Any) -> tuple[torch.Tensor, torch.Tensor]:
        held = Factors(U[rows[0][index]], V[rows[1][index]])
        grams = gram_matrices({"layer": held}, all_reduce)["layer"]
        return held.U @ grams.V, held.V @ grams.U

    processes = reference.Processes(3)
    found = processes.run(process)
    assert len(processes.calls) == 1
    for pieces, expected in zip(zip(*found, strict=True), reference.gradients(U, V, half_square), strict=True):
        torch.testing.assert_close(torch.cat(pieces), expected, rtol=1e-12, atol=1e-12)


def build(strength: float, *, in_loss: bool = False) -> tuple[Engine, Any]:
    """An engine of two low-rank layers, and its initial values by name."""
    with torch.device("meta"):
        settings = ModelSettings(name="gpt2", num_layers=1, num_heads=2, hidden_size=8, max_seq_len=8)
        skeleton = build_model(settings, 16)
    shapes = {"up": (32, 8, 3), "down": (8, 32, 2)}

    def start(name: str) -> torch.Tensor:
        layer, _, leaf = name.rpartition(".")
        if leaf in ("U", "V"):
            out, in_, R = shapes[layer.rpartition(".")[2]]
            return reference.normal(out if leaf == "U" else in_, R, len(name) + ord(leaf))
        return 0.1 * torch.ones(skeleton.get_parameter(name).shape)

    engine = Engine(
        skeleton,
        LAYOUT,
        start,
        context=Context(),
        optimizer=OptimizerSettings(weight_decay=0.0),
        options=BuildOptions(frobenius_decay=strength, frobenius_in_loss=in_loss),
    )
    return engine, start


LAYOUT = {"blocks.0.mlp.up": LayerLayout(3, 3, False), "blocks.0.mlp.down": LayerLayout(2, 2, False)}
TOKENS = torch.arange(16).view(2, 8)


def test_in_the_loss_it_adds_the_gradient_of_the_term() -> None:
    gradients = {}
    for strength in (0.0, 0.7):
        engine, start = build(strength, in_loss=True)
        engine.accumulate([(TOKENS, TOKENS)], TOKENS.numel())
        gradients[strength] = {name: p.grad.clone().double() for name, p in engine.module.named_parameters()}
    for layer in LAYOUT:
        U, V = start(f"{layer}.U"), start(f"{layer}.V")
        for leaf, gradient in zip("UV", reference.gradients(U, V, half_square), strict=True):
            added = gradients[0.7].pop(f"{layer}.{leaf}") - gradients[0.0].pop(f"{layer}.{leaf}")
            assert torch.allclose(added, 0.7 * gradient.double(), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, gradients[0.0][name]) for name, value in gradients[0.7].items())


def test_one_step_moves_both_factors_by_the_gradient_at_the_same_point() -> None:
    # Decoupled, as weight decay is: the difference to a step without it is lr * decay * gradient, with both gradients
    # taken before either factor moves, and nothing but the factors differs.
    lr, decay = 1e-2, 0.7
    after = {}
    for strength in (0.0, decay):
        engine, start = build(strength)
        engine.accumulate([(TOKENS, TOKENS)], TOKENS.numel())
        engine.step(lr, engine.gradient_norm()[0])
        after[strength] = {name: p.detach().cpu().double() for name, p in engine.module.named_parameters()}
    for layer in LAYOUT:
        U, V = start(f"{layer}.U"), start(f"{layer}.V")
        for leaf, gradient in zip("UV", reference.gradients(U, V, half_square), strict=True):
            moved = after[decay].pop(f"{layer}.{leaf}") - after[0.0].pop(f"{layer}.{leaf}")
            assert torch.allclose(moved, -lr * decay * gradient, rtol=1e-4, atol=1e-6)
    assert after[decay].keys() == after[0.0].keys()
    assert all(torch.equal(value, after[0.0][name]) for name, value in after[decay].items())
