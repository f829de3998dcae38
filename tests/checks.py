"""What workers of the pool check in a running engine; each raises AssertionError in the process where it fails."""

from collections.abc import Iterable, Mapping
from typing import Any
from unittest.mock import patch

import torch
from runs import train
from torch import Tensor
from torch.distributed.tensor import Shard

from inrank_dist.config import Config
from inrank_dist.lowrank import spectrum
from inrank_dist.lowrank.layer import core_names, set_fused
from inrank_dist.lowrank.spectrum import Grams, gram_matrices
from inrank_dist.runtime.agreement import Disagreement
from inrank_dist.train.loop import Trainer


def whole(tensor: Tensor) -> Tensor:
    """A parameter or moment in one piece, copied."""
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()


def wholes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and moments in one piece, copied; what is in shards is gathered all at once."""
    shards = {name: tensor for name, tensor in tensors.items() if getattr(tensor, "placements", None) == (Shard(0),)}
    every: list[Any] = []
    if shards:
        group = next(iter(shards.values())).device_mesh.get_group()  # type: ignore[attr-defined]
        every = [None] * group.size()
        own = {name: tensor.detach().to_local() for name, tensor in shards.items()}  # type: ignore[attr-defined]
        torch.distributed.all_gather_object(every, own, group=group)
    return {
        name: torch.cat([rows[name] for rows in every]) if name in shards else whole(tensor)
        for name, tensor in tensors.items()
    }


def function_of(trainer: Trainer) -> dict[str, Tensor]:
    """Logits of fixed tokens, and the product of the factors of every layer in float64."""
    tokens = torch.arange(2 * 16).view(2, 16) % 301
    trainer.engine.model.eval()
    with torch.no_grad():
        seen = {"logits": trainer.engine.logits(tokens)}
    layout, tensors = trainer.engine.layout, trainer.engine.tensors()
    factors = factors_of(trainer, layout)
    for name, layer in layout.items():
        cores = [f"{name}.{core}" for core in core_names(layer.depth)]
        left = factors[f"{name}.U"]
        for core in reversed(list(wholes({core: tensors[core] for core in cores}).values())):
            left = left @ core.double()
        seen[name] = left @ factors[f"{name}.V"].T
    return seen


def factors_of(trainer: Trainer, layers: Iterable[str]) -> dict[str, Tensor]:
    """The factors of layers in one piece, float64."""
    tensors = trainer.engine.tensors()
    names = [f"{name}.{factor}" for name in layers for factor in "UV"]
    return {name: tensor.double() for name, tensor in wholes({name: tensors[name] for name in names}).items()}


def growth_and_freeze(config: Config) -> list[str]:
    """Growth changes no logit; the freeze changes each product by exactly the discarded singular values.

    Returns:
        The actions that changed the model.
    """
    actions: list[str] = []

    def hook(trainer: Trainer) -> None:
        after_step = trainer.ranks.after_step

        def observed(step: int, *batch: Any) -> list[dict[str, Any]]:
            action = trainer.ranks.due(step)
            if action is None:
                return after_step(step, *batch)
            before, modes = function_of(trainer), [layer.modes for layer in trainer.engine.layout.values()]
            records = after_step(step, *batch)
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
                if action == "grow":  # the same columns, and zeros; float64 sums them in another order
                    assert float(change.abs().max()) <= 1e-14 * scale
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

        def after(step: int, *batch: Any) -> list[dict[str, Any]]:
            nonlocal rebuilt
            module = engine.module
            records = after_step(step, *batch)
            if engine.module is not module:
                rebuilt += 1
                assert not still
                engine.check()
                assert {float(state["step"]) for state in engine.optimizer.state.values()} == {step}
                tensors = engine.tensors()
                trained = [name for name, p in engine.parameters().items() if p.requires_grad]
                for name in trained:
                    moments = [tensors[f"optimizer.{moment}.{name}"] for moment in ("exp_avg", "exp_avg_sq")]
                    assert all(moment.shape == tensors[name].shape for moment in moments)
                still.update(wholes({name: tensors[name] for name in trained}))
            return records

        def moved(lr: float, norm: Tensor) -> None:
            move(lr, norm)
            if not still:
                return
            tensors = engine.tensors()
            for name, now in wholes({name: tensors[name] for name in still}).items():
                before = still.pop(name)
                columns = (now != before).any(0) if now.ndim == 2 else (now != before).any()
                # Weight decay moves every column of V; a fresh column of U, zero so far, moves by its gradient alone.
                assert columns.all(), f"{name}: {columns.tolist()}"

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

    with patch.object(spectrum, "gram_matrices", tampered):
        try:
            train(config, hook=hook)
        except Disagreement as error:
            engine = kept.pop().engine
            assert engine.optimizer_steps == 8
            assert {layer.rank for layer in engine.layout.values()} == {1}
            return str(error)
    raise AssertionError("nobody noticed")


def aims_at_the_gradient(config: Config) -> float:
    """New columns of V are orthonormal, orthogonal to the old ones, and hold the top directions of the dense gradient.

    Returns:
        The mean share, over layers and events, of the best possible gradient energy that the fresh columns hold.
    """
    shares: list[float] = []

    def hook(trainer: Trainer) -> None:
        engine, after_step = trainer.engine, trainer.ranks.after_step

        def observed(step: int, *batch: Any) -> list[dict[str, Any]]:
            before = {name: layer.modes for name, layer in engine.layout.items()}
            logits = function_of(trainer)["logits"] if trainer.ranks.due(step) else None
            records = after_step(step, *batch)
            grown = {n: layer.modes for n, layer in engine.layout.items() if layer.modes > before[n]}
            if not grown or trainer.ranks.frozen:
                return records
            assert logits is not None
            torch.testing.assert_close(function_of(trainer)["logits"], logits, rtol=0, atol=1e-6)
            factors = factors_of(trainer, grown)
            dense = dense_gradients(trainer, list(grown), *batch[0].args)
            for name in grown:
                old = before[name]
                U, V = (factors[f"{name}.{factor}"] for factor in "UV")
                assert not U[:, old:].any()
                fresh = V[:, old:]
                overlap = V.T @ fresh
                expected = torch.zeros_like(overlap)
                expected[old:] = torch.eye(fresh.shape[1])
                scale = V.norm(dim=0)[:, None]
                torch.testing.assert_close(overlap / scale, expected, rtol=0, atol=1e-5)
                basis = torch.linalg.qr(V[:, :old])[0]
                outside = dense[name] - dense[name] @ basis @ basis.T
                best = torch.linalg.svdvals(outside)[: fresh.shape[1]].square().sum()
                shares.append(float((dense[name] @ fresh).square().sum() / best))
            return records

        trainer.ranks.after_step = observed  # type: ignore[method-assign]

    train(config, hook=hook)
    return sum(shares) / len(shares)


def outer_factors_of_the_gradient(config: Config) -> tuple[float, float]:
    """``U`` and ``V`` start orthonormal, half of each from the singular vectors of the dense gradient; cores do not
    change, and the run trains.

    Returns:
        The least share of the best possible gradient energy that the columns of ``U`` and of ``V`` hold in a layer.
    """
    shares: list[tuple[float, float]] = []

    def hook(trainer: Trainer) -> None:
        engine, start = trainer.engine, trainer.ranks.start

        def observed(gradients: Any) -> None:
            random = {name: rows.U.clone() for name, rows in engine.held_rows(engine.layout).items()}
            for name in random:
                engine.set_columns(name, 0, 0.0, engine.held_rows([name])[name].V.clone())
            dense = dense_gradients(trainer, list(random), *gradients.args)
            for name, rows in random.items():
                engine.set_columns(name, 0, rows, engine.held_rows([name])[name].V.clone())
            start(gradients)
            factors = factors_of(trainer, engine.layout)
            for name, layer in engine.layout.items():
                U, V = (factors[f"{name}.{factor}"] for factor in "UV")
                for factor in (U, V):
                    torch.testing.assert_close(factor.T @ factor, torch.eye(layer.modes).double(), rtol=0, atol=1e-5)
                half = (layer.modes + 1) // 2
                sigma = torch.linalg.svdvals(dense[name]).square()
                left = (U[:, half:].T @ dense[name]).square().sum() / sigma[: layer.modes - half].sum()
                right = (dense[name] @ V[:, :half]).square().sum() / sigma[:half].sum()
                shares.append((float(left), float(right)))
                trained = config.lowrank.outer_lr_scale > 0
                parameters = engine.parameters()
                assert [parameters[f"{name}.{leaf}"].requires_grad for leaf in ("U", "V", "C1")] == [trained] * 2 + [
                    True
                ]

        trainer.ranks.start = observed  # type: ignore[method-assign]

    train(config, hook=hook)
    return min(left for left, _ in shares), min(right for _, right in shares)


def dense_gradients(trainer: Trainer, layers: list[str], batches: Any, tokens: int) -> dict[str, Tensor]:
    """Gradients of whole weights, float64: ``sum dy x^T`` over all micro-batches and processes."""
    engine = trainer.engine
    gradients: dict[str, Tensor] = {}
    hooks = []
    set_fused(engine.module, False)  # layers that run together are not called one by one
    for name in layers:
        inputs: list[Tensor] = []

        def forward(module: Any, arguments: Any, output: Any, inputs: list[Tensor] = inputs) -> None:
            inputs.append(arguments[0].detach().flatten(0, -2).double())

        def backward(module: Any, into: Any, out: Any, name: str = name, inputs: list[Tensor] = inputs) -> None:
            product = out[0].flatten(0, -2).double().T @ inputs.pop()
            gradients[name] = gradients.get(name, torch.zeros_like(product)) + product

        module = engine.module.get_submodule(name)
        hooks += [module.register_forward_hook(forward), module.register_full_backward_hook(backward)]
    engine.accumulate(batches, tokens, training=False)
    engine.drop_gradients()
    for hook in hooks:
        hook.remove()
    set_fused(engine.module, True)
    for name in layers:
        engine.context.sum(gradients[name])
    return gradients


def bad_gradient(config: Config, where: str, process: int, step: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Train with NaN at one step in one process's ``loss``, in its ``backward`` pass, which spreads it to all, or in
    its part of the combined ``gradient``.

    Returns:
        The records, and what changed in the step: names of parameters and moments.
    """
    changed: list[str] = []

    def hook(trainer: Trainer) -> None:
        engine, train_step = trainer.engine, trainer._update
        accumulate, gradient_norm, micro_loss = engine.accumulate, engine.gradient_norm, engine.loss

        def bad() -> bool:
            return trainer.step == step and trainer.context.rank == process

        def norm() -> tuple[Tensor, Tensor]:
            if where == "gradient" and bad():
                next(rows for rows in engine._gradients() if rows.numel()).fill_(float("nan"))
            return gradient_norm()

        def loss(batches: Any, tokens: int, **options: Any) -> Tensor:
            total = accumulate(batches, tokens, **options)
            return total * float("nan") if where == "loss" and bad() else total

        def forward(*batch: Any) -> Tensor:
            result = micro_loss(*batch)
            if where == "backward" and bad():
                result.register_hook(lambda gradient: gradient * float("nan"))
            return result

        def observed(batches: Any) -> Any:
            if trainer.step != step:
                return train_step(batches)
            before = wholes(engine.tensors())
            verdict = train_step(batches)
            after = wholes(engine.tensors())
            changed.extend(name for name in after if not torch.equal(after[name], before[name]))
            assert all(p.grad is None for p in engine.parameters().values())
            return verdict

        engine.accumulate, engine.gradient_norm, trainer._update = loss, norm, observed  # type: ignore
        engine.loss = forward  # type: ignore[method-assign]

    recorder, _ = train(config, hook=hook)
    return recorder.records, changed
