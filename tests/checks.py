"""What workers of the pool check in a running engine; each raises AssertionError in the process where it fails."""

from typing import Any
from unittest.mock import patch

import torch
from runs import train
from torch import Tensor

from inrank_dist.config import Config
from inrank_dist.engine.context import Disagreement
from inrank_dist.lowrank.spectrum import Grams, gram_matrices
from inrank_dist.train import ranks
from inrank_dist.train.loop import Trainer


def whole(tensor: Tensor) -> Tensor:
    """A parameter or moment in one piece, copied."""
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()


def function_of(trainer: Trainer) -> dict[str, Tensor]:
    """Logits of fixed tokens, and ``U V^T`` of every layer in float64."""
    tokens = torch.arange(2 * 16).view(2, 16) % 301
    trainer.engine.model.eval()
    with torch.no_grad():
        seen = {"logits": trainer.engine.logits(tokens)}
    parameters = trainer.engine.parameters()
    for name in trainer.engine.layout:
        seen[name] = whole(parameters[f"{name}.U"]).double() @ whole(parameters[f"{name}.V"]).double().T
    return seen


def growth_and_freeze(config: Config) -> list[str]:
    """Growth changes no logit; the freeze changes each product by exactly the discarded singular values.

    Returns:
        The actions that changed the model.
    """
    actions: list[str] = []

    def hook(trainer: Trainer) -> None:
        after_step = trainer.ranks.after_step

        def observed(step: int) -> list[dict[str, Any]]:
            action = trainer.ranks.policy.action(step)
            if action is None:
                return after_step(step)
            before, modes = function_of(trainer), [layer.modes for layer in trainer.engine.layout.values()]
            records = after_step(step)
            layout = trainer.engine.layout
            if modes == [layer.modes for layer in layout.values()]:
                return records
            actions.append(action)
            after = function_of(trainer)
            if action == "grow":
                torch.testing.assert_close(after["logits"], before["logits"], rtol=0, atol=1e-6)
            for name, layer in layout.items():
                sigma = torch.linalg.svdvals(before[name])
                kept = layer.rank if action == "freeze" else len(sigma)
                change = before[name] - after[name]
                discarded = sigma[kept:]
                scale = float(sigma[0])
                torch.testing.assert_close(change.norm(), discarded.norm(), rtol=1e-5, atol=1e-6 * scale)
                if action == "grow":
                    assert not change.any()
            return records

        trainer.ranks.after_step = observed  # type: ignore[method-assign]

    train(config, hook=hook)
    return actions


def every_parameter_moves(config: Config) -> int:
    """After every event each parameter is the optimizer's and the engine's, keeps its step count, and moves.

    Returns:
        How many times the model was rebuilt.
    """
    rebuilt = 0

    def hook(trainer: Trainer) -> None:
        engine = trainer.engine
        after_step, move = trainer.ranks.after_step, engine.step
        still: dict[str, Tensor] = {}

        def after(step: int) -> list[dict[str, Any]]:
            nonlocal rebuilt
            module = engine.module
            records = after_step(step)
            if engine.module is not module:
                rebuilt += 1
                assert not still
                trained = {name: p for name, p in engine.parameters().items() if p.requires_grad}
                assert {id(p) for g in engine.optimizer.param_groups for p in g["params"]} == set(
                    map(id, trained.values())
                )
                for name, parameter in trained.items():
                    state = engine.optimizer.state[parameter]
                    assert float(state["step"]) == step
                    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
                    still[name] = whole(parameter)
            return records

        def moved(lr: float) -> Tensor:
            norm = move(lr)
            for name, parameter in engine.parameters().items():
                if name not in still:
                    continue
                now, before = whole(parameter), still.pop(name)
                columns = (now != before).any(0) if now.ndim == 2 else (now != before).any()
                # Weight decay moves every column of V; a fresh column of U, zero so far, moves by its gradient alone.
                assert columns.all(), f"{name}: {columns.tolist()}"
            return norm

        trainer.ranks.after_step, engine.step = after, moved  # type: ignore[method-assign]

    train(config, hook=hook)
    return rebuilt


def disagreement(config: Config, liar: int) -> str:
    """One process holds another Gram of one layer after the all-reduce; all stop before anything is touched.

    Returns:
        What the error says.
    """
    kept: list[Trainer] = []

    def hook(trainer: Trainer) -> None:
        kept.append(trainer)

    def tampered(*arguments: Any) -> dict[str, Grams]:
        grams = gram_matrices(*arguments)
        if kept[0].context.rank == liar:
            name = "blocks.1.mlp.up"
            weights = torch.logspace(0, 6, grams[name].V.shape[0], dtype=torch.float64)
            grams[name] = Grams(grams[name].U, grams[name].V * weights * weights[:, None])
        return grams

    with patch.object(ranks, "gram_matrices", tampered):
        try:
            train(config, hook=hook)
        except Disagreement as error:
            engine = kept.pop().engine
            assert engine.optimizer_steps == 8
            assert {layer.rank for layer in engine.layout.values()} == {1}
            return str(error)
    raise AssertionError("nobody noticed")
