"""Every step of every engine is the textbook's: loss, clipping, parameter groups, AdamW, schedule, moments at events.

Engines are otherwise compared with each other; what all of them did wrong would be seen by none.
"""

from pathlib import Path
from typing import Any

import pytest
import reference_step as reference
import torch
from checks import wholes
from pool import Pool
from runs import short_config, train
from sharing import nightly, slow
from torch import Tensor

from inrank_dist.config import Config
from inrank_dist.train.loop import Trainer


def near(got: Tensor, expected: Tensor, relative: float, what: str) -> None:
    """Equal to a share of the largest entry: sums of float32 are that exact, whatever their terms."""
    scale = max(float(expected.abs().max()), 1e-30)
    error = float((got.double() - expected.double()).abs().max()) / scale
    assert error <= relative, f"{what}: off by {error:.1e} of its largest entry"


def followed(config: Config) -> list[str]:
    """Train, and hold each step and each rank event to the reference; of several processes, which gather every tensor
    for it, the first step and those that follow the events.

    Returns:
        What was held to it, in order: ``step``, ``grow``, ``freeze``.
    """
    done: list[str] = []

    def hook(trainer: Trainer) -> None:
        engine, context = trainer.engine, trainer.context
        take_step, after_step = trainer.take_step, trainer.ranks.after_step

        def state() -> dict[str, Tensor]:
            return wholes(engine.tensors())

        def observed_step() -> Any:
            step = trainer.step
            if context.world_size > 1 and step % config.lowrank.interval:
                return take_step()
            before = state()
            batches, verdict, rate = take_step()
            after = state()
            every = [batch for each in context.gather([(x.clone(), y.clone()) for x, y in batches]) for batch in each]
            inputs, targets = (torch.cat(side) for side in zip(*every, strict=True))
            assert inputs.shape == (config.train.global_batch_size, config.model.max_seq_len)
            check_step(config, before, after, (inputs, targets), step, verdict, rate)
            done.append("step")
            return batches, verdict, rate

        def observed_event(step: int, *batch: Any) -> Any:
            action = trainer.ranks.due(step)
            if not action or config.optimizer.name == "sgd":
                return after_step(step, *batch)
            before = state()
            records = after_step(step, *batch)
            check_event(config, before, state(), list(engine.layout), step, action)
            done.append(action)
            return records

        trainer.take_step = observed_step  # type: ignore[method-assign]
        trainer.ranks.after_step = observed_event  # type: ignore[method-assign]

    train(config, hook=hook)
    return done


def check_step(
    config: Config,
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    batch: tuple[Tensor, Tensor],
    step: int,
    verdict: Any,
    rate: float,
) -> None:
    """One step, from the tensors before it."""
    settings, shape = config.optimizer, config.model
    model = reference.Model(
        shape.name, shape.num_layers, shape.num_heads, shape.num_kv_heads or shape.num_heads,
        bottleneck=config.lowrank.activation == "silu", crossing=shape.layer_crossing,
    )  # fmt: skip
    parameters = {name: tensor for name, tensor in before.items() if not name.startswith("optimizer.")}
    fade = 1.0
    if config.lowrank.base == "decay":
        fade = max(0.0, 1 - step / config.lowrank.warmup_steps)
    loss, gradients = reference.loss_and_gradients(model, parameters, *batch, fade)
    assert verdict.loss == pytest.approx(loss, rel=1e-5)
    norm, gradients = reference.clipped(gradients, config.train.grad_clip)
    assert verdict.norm == pytest.approx(norm, rel=1e-4)
    schedule = config.schedule
    lr = reference.learning_rate(settings.lr, step, config.train.steps, schedule.warmup_steps, schedule.min_lr_ratio)
    assert rate == pytest.approx(lr, rel=1e-12)
    matrix_scale = settings.matrix_lr / settings.lr
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    factors: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        decay = settings.weight_decay if reference.is_decayed(name) else 0.0
        gradient = gradient + (decay if settings.name == "sgd" else 0) * before[name].double()
        moved = []
        for moment, (beta, weight) in rules(config, name).items():
            key = f"optimizer.{moment}.{name}"
            old = before[key].double() if key in before else torch.zeros_like(gradient)
            power = gradient.square() if moment == "exp_avg_sq" else gradient
            # A gradient that is zero by mathematics, such as that of a key's bias, is noise of the size of the others.
            noise = 1e-5 * largest ** (2 if moment == "exp_avg_sq" else 1)
            expected = beta * old + weight * power
            error = float((after[key].double() - expected).abs().max())
            assert error <= 1e-4 * float(expected.abs().max()) + noise, f"step {step + 1}, {moment} of {name}: {error}"
            moved.append(after[key])
        what = f"step {step + 1}, {name}"
        if is_matrix(config, name):
            mix = (1 - settings.momentum) * gradient + settings.momentum * moved[0].double()
            if name.endswith(".weight"):
                expected = reference.muon(before[name], mix, lr=lr * matrix_scale, decay=decay)
                near(after[name], expected, 1e-4, what)
            else:
                factors[name] = mix
        elif settings.name == "sgd":
            near(after[name], before[name].double() - lr * moved[0].double(), 1e-6, what)
        else:
            expected = reference.adamw(
                before[name], *moved, step=step + 1, lr=lr, decay=decay, betas=(settings.beta1, settings.beta2),
                eps=settings.eps,
            )  # fmt: skip
            # Weight decay moves a parameter by 3e-4 of itself, and so is a hundred times this.
            near(after[name], expected, 1e-6, what)
    for name in factors:
        if name.endswith(".U"):
            both = name, f"{name.removesuffix('.U')}.V"
            rates = {"lr": lr * matrix_scale, "decay": settings.weight_decay}
            pair = reference.factors_after(
                settings.name, *(before[each] for each in both), *(factors[each] for each in both), **rates
            )
            for each, expected in zip(both, pair, strict=True):
                near(after[each], expected, 1e-4, f"step {step + 1}, {each}")
    for name in parameters.keys() - gradients.keys():
        assert torch.equal(after[name], before[name]), f"{name} has no gradient, but moved"


def is_matrix(config: Config, name: str) -> bool:
    """Whether a parameter is trained by orthogonalised updates: what is decayed, but for the head."""
    return config.optimizer.orthogonalises and reference.is_decayed(name) and name != "head.weight"


def rules(config: Config, name: str) -> dict[str, tuple[float, float]]:
    """What is remembered of a parameter: the moment -> how much of it is kept, and how much of what is new comes in."""
    settings = config.optimizer
    if is_matrix(config, name):
        return {"momentum_buffer": (settings.momentum, 1 - settings.momentum)}
    if settings.name == "sgd":
        return {"momentum_buffer": (settings.beta1, 1.0)}
    return {"exp_avg": (settings.beta1, 1 - settings.beta1), "exp_avg_sq": (settings.beta2, 1 - settings.beta2)}


def check_event(
    config: Config, before: dict[str, Tensor], after: dict[str, Tensor], layers: list[str], step: int, action: str
) -> None:
    """The moments of one factor move with the map of the other, which the factors tell; nothing else moves."""
    betas = (config.optimizer.beta1, config.optimizer.beta2)
    if f"{layers[0]}.U" not in before:
        return check_factorised(config, before, after, layers, step)
    for layer in layers:
        old = {factor: before[f"{layer}.{factor}"].double() for factor in "UV"}
        new = {factor: after[f"{layer}.{factor}"].double() for factor in "UV"}
        modes = old["U"].shape[1]
        for factor, other in (("U", "V"), ("V", "U")):
            name = f"{layer}.{factor}"
            moments = {moment: before[f"optimizer.{moment}.{name}"].double() for moment in rules(config, name)}
            moved = {moment: after[f"optimizer.{moment}.{name}"].double() for moment in moments}
            if action == "grow":  # the columns so far are untouched
                near(new[factor][:, :modes], old[factor], 1e-6, name)
                for moment, was in moments.items():
                    near(moved[moment][:, :modes], was, 1e-5, f"{moment} of {name}")
                continue
            Q = torch.linalg.lstsq(old[other], new[other]).solution
            near(old[other] @ Q, new[other], 1e-4, f"{layer}.{other} is no map of what it was")
            if "momentum_buffer" in moments:
                near(moved["momentum_buffer"], moments["momentum_buffer"] @ Q, 1e-3, f"momentum of {name}")
                continue
            m, v = moments["exp_avg"], moments["exp_avg_sq"]
            near(moved["exp_avg"], m @ Q, 1e-3, f"exp_avg of {name}")
            m, v = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
            mapped = ((v - m.square()) @ Q.square() + (m @ Q).square()).abs() * (1 - betas[1] ** step)
            near(moved["exp_avg_sq"], mapped, 1e-3, f"exp_avg_sq of {name}")
    factors = {f"{layer}.{factor}" for layer in layers for factor in "UV"}
    for name in after:
        if not any(name.endswith(factor) for factor in factors):
            assert torch.equal(after[name], before[name]), f"{name} moved at a rank event"


def check_factorised(
    config: Config, before: dict[str, Tensor], after: dict[str, Tensor], layers: list[str], step: int
) -> None:
    """A dense layer becomes its best approximation, in balanced factors; moments move as gradients do."""
    for layer in layers:
        U, V = (after[f"{layer}.{factor}"].double() for factor in "UV")
        left, sigma, right = torch.linalg.svd(before[f"{layer}.weight"].double(), full_matrices=False)
        rank = U.shape[1]
        assert config.lowrank.grows or rank == config.lowrank.initial_rank
        near(U @ V.T, (left[:, :rank] * sigma[:rank]) @ right[:rank], 1e-5, f"{layer} is not the best approximation")
        for factor in (U, V):
            near(factor.T @ factor, sigma[:rank].diag(), 1e-5, f"{layer} is not balanced")
        for factor, other in (("U", V), ("V", U)):
            old = {
                moment: before[f"optimizer.{moment}.{layer}.weight"].double()
                for moment in rules(config, f"{layer}.{factor}")
            }
            old = {moment: each if factor == "U" else each.T for moment, each in old.items()}
            new = {moment: after[f"optimizer.{moment}.{layer}.{factor}"].double() for moment in old}
            if "momentum_buffer" in old:
                near(new["momentum_buffer"], old["momentum_buffer"] @ other, 1e-4, f"momentum of {layer}.{factor}")
                continue
            near(new["exp_avg"], old["exp_avg"] @ other, 1e-4, f"exp_avg of {layer}.{factor}")
            correction = 1 - config.optimizer.beta2**step
            m = old["exp_avg"] / (1 - config.optimizer.beta1**step)
            v = old["exp_avg_sq"] / correction
            mapped = ((v - m.square()) @ other.square() + (m @ other).square()).abs() * correction
            near(new["exp_avg_sq"], mapped, 1e-4, f"exp_avg_sq of {layer}.{factor}")
    replaced = {f"{layer}.{factor}" for layer in layers for factor in ("U", "V", "weight")}
    for name in after:
        if not any(name.endswith(factor) for factor in replaced):
            assert torch.equal(after[name], before[name]), f"{name} moved at a rank event"


MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"schedule__warmup_steps": 4, "schedule__min_lr_ratio": 0.1},
    "llama": {
        "model__name": "llama", "model__num_heads": 4, "model__num_kv_heads": 2, "lowrank__targets": "[mlp]",
        "train__grad_clip": 0.0,
    },
    "sgd": {"optimizer__name": "sgd", "optimizer__lr": 0.1},
    "no base": {"lowrank__base": "none", "lowrank__init": "spectral"},
    "full": {"lowrank__mode": "full"},
    "bottleneck": {"lowrank__mode": "fixed", "lowrank__base": "none", "lowrank__activation": "silu"},
    "crossing": {"model__layer_crossing": "true"},
    "crossing, full, llama": {"model__layer_crossing": "true", "model__name": "llama", "lowrank__mode": "full"},
    "dense first": {"lowrank__base": "none", "lowrank__dense_fraction": 0.5, "lowrank__threshold": 0.7},
    "dense first, fixed, lora_muon": {
        "lowrank__base": "none", "lowrank__dense_fraction": 0.5, "lowrank__mode": "fixed", "lowrank__initial_rank": 5,
        "optimizer__name": "lora_muon",
    },
    "muon": {"lowrank__mode": "full", "optimizer__name": "muon", "model__tie_embeddings": "false"},
    "spectron": {"optimizer__name": "spectron", "lowrank__targets": "[mlp]"},
    "lora_muon": {"optimizer__name": "lora_muon"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "engine", "world_size"),
    [
        ("gpt2", "local", 1), ("llama", "local", 1), ("sgd", "local", 1), ("no base", "local", 1), ("full", "local", 1),
        ("bottleneck", "local", 1), ("dense first", "local", 1), ("dense first, fixed, lora_muon", "local", 1),
        ("crossing", "local", 1), ("crossing, full, llama", "local", 1),
        slow("dense first, fixed, lora_muon", "fsdp", 3), nightly("dense first", "zero2", 2),
        slow("dense first", "fsdp", 2), slow("dense first", "zero3", 2),
        ("muon", "local", 1), ("spectron", "local", 1), ("lora_muon", "local", 1),
        slow("muon", "fsdp", 3), slow("spectron", "fsdp", 3), slow("lora_muon", "fsdp", 3), slow("muon", "ddp", 2),
        slow("lora_muon", "ddp", 2), slow("crossing", "fsdp", 3), slow("crossing, full, llama", "zero3", 2),
        nightly("crossing", "zero2", 3), nightly("crossing", "zero3", 2),
        ("gpt2", "ddp", 2), ("gpt2", "fsdp", 3), slow("llama", "fsdp", 2), slow("sgd", "ddp", 2),
        nightly("gpt2", "zero0", 2), nightly("gpt2", "zero1", 2), slow("gpt2", "zero2", 3),
        nightly("llama", "zero2", 2),
        nightly("gpt2", "zero3", 2), slow("llama", "zero3", 3), nightly("sgd", "zero3", 2), slow("sgd", "fsdp", 2),
    ],
)  # fmt: skip
def test_every_step_is_the_textbooks(pool: Pool, corpus: Path, model: str, engine: str, world_size: int) -> None:
    config = short_config(
        corpus, parallel__engine=engine, train__global_batch_size=6, train__micro_batch_size=1, **MODELS[model]
    )
    events = (
        [] if model in ("sgd", "full", "muon", "bottleneck", "crossing, full, llama") else ["grow", "grow", "freeze"]
    )
    if model.startswith("dense first"):
        events = ["factorise" if "fixed" in model else "freeze"]
    for done in pool.run("test_reference_step:followed", config, world_size=world_size):
        assert done.count("step") == (12 if world_size == 1 else 4)
        assert [each for each in done if each != "step"] == events
