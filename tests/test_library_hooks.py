"""InRank in the Trainer of transformers and in loops with accelerate: the run of a LowRankRun by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hooks_checks
import pytest
import torch
from accelerate.utils import DistributedType, DynamoBackend
from hooks_checks import STEPS, by_accelerate, by_hand, by_trainer, make_trainer, one_of
from library_checks import BATCH, MODELS, logits_of, method, whole_batch
from pool import Pool
from sharing import slow
from torch import nn

import inrank_dist as inrank

CHOICES: dict[str, dict[str, Any]] = {
    "decaying base": {},
    "no base": {"base": "none", "init": "spectral"},
    "dense start": {"base": "none", "dense_fraction": 0.25, "freeze_step": None},
}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(torch.tensor(ours["losses"]), torch.tensor(theirs["losses"]), atol=tolerance, rtol=0)
    assert ours["ranks"] == theirs["ranks"]
    for logits in ("logits", "merged"):
        torch.testing.assert_close(ours[logits], theirs[logits], atol=100 * tolerance, rtol=0)


@pytest.mark.parametrize(("name", "choice"), [("gpt2", "decaying base"), ("llama", "no base"), ("gpt2", "dense start")])
def test_the_trainer_gives_the_run_of_a_hand_written_loop(name: str, choice: str, tmp_path: Path) -> None:
    hand = by_hand(name, **CHOICES[choice])
    ours = by_trainer(name, tmp_path, choice=CHOICES[choice], weight_decay=0.0)
    assert len(ours["losses"]) == STEPS and ours["losses"][-1] < ours["losses"][0]
    assert max(ours["ranks"].values()) > 2
    assert_same(ours, hand)


def test_the_trainer_keeps_its_mixed_precision_through_rank_events(tmp_path: Path) -> None:
    full, mixed = (by_trainer("llama", tmp_path, bf16=bf16)["losses"] for bf16 in (False, True))
    assert 0 < abs(full[-1] - mixed[-1]) < 0.05


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_loop_with_accelerate_gives_the_run_of_a_hand_written_loop(pieces: int) -> None:
    assert_same(by_accelerate("llama", pieces=pieces), by_hand("llama"))


@pytest.mark.parametrize("name", ["gpt2", slow("llama")])
def test_the_trainer_on_two_processes_gives_the_run_of_one(name: str, pool: Pool, tmp_path: Path) -> None:
    one = by_trainer(name, tmp_path / "one")
    options = {"per_device_train_batch_size": BATCH // 4, "gradient_accumulation_steps": 2}
    both = pool.run("hooks_checks:in_processes", name, str(tmp_path), 2, None, {}, options, world_size=2, timeout=120)
    for result in both:
        assert_same(result, one, 1e-5)
        assert abs(result["evaluated"] - one["evaluated"]) < 1e-4


def test_a_loop_with_accelerate_on_two_processes_gives_the_run_of_one(pool: Pool) -> None:
    for result in pool.run("hooks_checks:by_accelerate", "gpt2", 2, world_size=2, timeout=120):
        assert_same(result, by_accelerate("gpt2"), 1e-5)


@pytest.mark.parametrize(
    ("choice", "at", "world_size"),
    [("decaying base", 4, 1), slow("no base", 4, 1), slow("decaying base", 10, 1), ("dense start", 2, 2)],
)
def test_a_trainer_resumed_from_a_checkpoint_is_the_straight_run(
    choice: str, at: int, world_size: int, pool: Pool, tmp_path: Path
) -> None:
    def trained(folder: Path, resume: str | None) -> dict[str, Any]:
        settings = (CHOICES[choice], {"save_steps": at, "save_strategy": "steps"})
        if world_size == 1:
            return by_trainer("gpt2", folder, 1, resume, settings[0], **settings[1])
        values = ("gpt2", str(folder), world_size, resume, *settings)
        return pool.run("hooks_checks:in_processes", *values, world_size=world_size, timeout=120)[-1]

    straight = trained(tmp_path / "straight", None)
    resumed = trained(tmp_path / "resumed", str(tmp_path / "straight" / f"checkpoint-{at}"))
    assert len(resumed["losses"]) == STEPS
    assert_same(resumed, straight)
    assert resumed["lr"] == straight["lr"]


def test_what_the_trainer_saves_is_the_dense_model(tmp_path: Path) -> None:
    """Its checkpoints, its save_model and what merge gives are read by from_pretrained."""
    with one_of(1):
        trainer = make_trainer("llama", tmp_path, save_strategy="steps", save_steps=6)
        callback = inrank.InRankCallback(trainer, method(["all"], base="none"))
        trainer.train()
        trainer.save_model(str(tmp_path / "last"))
        callback.merge().save_pretrained(tmp_path / "merged")
        trainer.model.eval()
        expected = logits_of(trainer.model, whole_batch(999))
        kind = type(trainer.model)
        for folder in ("last", "merged", f"checkpoint-{STEPS}"):
            again, info = kind.from_pretrained(tmp_path / folder, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
            torch.testing.assert_close(logits_of(again.eval(), whole_batch(999)), expected, atol=1e-5, rtol=0)
        events = [entry for entry in trainer.state.log_history if "inrank/grow" in entry]
        assert events and events[-1]["inrank/rank"] > 2
        # A model that was loaded has weights that the method would drop.
        trainer = hooks_checks.Trainer(model=again, args=hooks_checks.arguments(tmp_path))
        with pytest.raises(inrank.UserError, match="loaded from"):
            inrank.InRankCallback(trainer, method(["all"]))


def test_a_resume_that_names_the_checkpoint_once_is_refused(tmp_path: Path) -> None:
    by_trainer("gpt2", tmp_path, save_strategy="steps", save_steps=4)
    folder = str(tmp_path / "checkpoint-4")
    with one_of(1):
        trainer = make_trainer("gpt2", tmp_path)
        inrank.InRankCallback(trainer, method(["all"]))
        with pytest.raises(inrank.UserError, match="InRankCallback as well"):
            trainer.train(resume_from_checkpoint=folder)
        trainer = make_trainer("gpt2", tmp_path)
        inrank.InRankCallback(trainer, method(["all"]), resume_from_checkpoint=True)
        with pytest.raises(inrank.UserError, match="at step 0 and the ranks are at step 12"):
            trainer.train()
        with pytest.raises(inrank.UserError, match=r"holds no inrank\.safetensors"):
            inrank.InRankCallback(
                make_trainer("gpt2", tmp_path), method(["all"]), resume_from_checkpoint=str(tmp_path / "nothing")
            )


def test_what_the_trainer_cannot_do_is_refused_at_construction(tmp_path: Path) -> None:
    def refused(message: str, **options: Any) -> None:
        with one_of(1):
            chosen = options.pop("method", None) or method(["all"])
            change = options.pop("change", lambda trainer: None)
            trainer = make_trainer("gpt2", tmp_path, **options)
            change(trainer)
            with pytest.raises(inrank.UserError, match=message):
                inrank.InRankCallback(trainer, chosen)

    def with_scaler(trainer: Any) -> None:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")

    def with_optimizer(trainer: Any) -> None:
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)

    # transformers 5.24 takes this name for activation_checkpointing, which older releases lack.
    refused("(activation|gradient)_checkpointing", gradient_checkpointing=True)
    refused("auto_find_batch_size", auto_find_batch_size=True)
    refused("neftune_noise_alpha", neftune_noise_alpha=5.0)
    refused("torch.compile", torch_compile=True)
    refused("load_best_model_at_end", load_best_model_at_end=True, save_strategy="steps", eval_strategy="steps")
    refused("square_avg", optim="rmsprop")
    refused("exp_avg_sq_row", optim="adafactor")
    refused("fp16", change=with_scaler)
    refused("optimizers=", change=with_optimizer)
    refused("PreTrainedModel", change=lambda trainer: setattr(trainer, "model", nn.Linear(2, 2)))
    refused("growth_init", method=method(["all"], growth_init="gradient"))
    refused("total_steps", method=inrank.InRank(["all"], freeze_step="auto"), max_steps=-1)


def test_an_accelerator_that_shards_or_compiles_is_refused_at_construction() -> None:
    def refused(message: str, change: Callable[[Any], None]) -> None:
        with one_of(1):
            accelerator = hooks_checks.Accelerator(cpu=True)
            change(accelerator.state)
            build, targets = MODELS["llama"]
            with pytest.raises(inrank.UserError, match=message):
                inrank.AcceleratedRun(
                    accelerator, build, method(targets), lambda groups: torch.optim.SGD(groups, lr=0.1)
                )

    # Accelerate takes these plugins on GPUs only, so its state is set as it would be there.
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        refused(f"{kind.value}.*fully_shard", lambda state, kind=kind: setattr(state, "distributed_type", kind))
    refused("parallelism_config", lambda state: setattr(state, "parallelism_config", object()))
    refused("torch.compile", lambda state: setattr(state.dynamo_plugin, "backend", DynamoBackend.INDUCTOR))


def test_the_state_of_accelerate_knows_no_ranks(tmp_path: Path) -> None:
    with one_of(1):
        accelerator = hooks_checks.Accelerator(cpu=True)
        build, targets = MODELS["llama"]
        inrank.AcceleratedRun(accelerator, build, method(targets), lambda groups: torch.optim.SGD(groups, lr=0.1))
        with pytest.raises(inrank.UserError, match=r"run\.save"):
            accelerator.save_state(str(tmp_path))
        with pytest.raises(inrank.UserError, match="square_avg"):
            inrank.AcceleratedRun(accelerator, build, method(targets), lambda groups: torch.optim.RMSprop(groups))
