"""InRank in a user's own loop: any model, any sharding by rows, the same run."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from library_checks import MODELS, alone, make_run, train
from pages import python_block
from pool import Pool
from sharing import slow

import inrank_dist as inrank
from inrank_dist.method.settings import LowRankSettings

STEPS = 12
CHOICES: dict[str, dict[str, Any]] = {
    "decaying base": {},
    "no base": {"base": "none", "init": "spectral"},
    "frozen base": {"base": "frozen"},
    "gradient": {"growth_init": "gradient", "base": "frozen"},
}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.tensor(ours["losses"]), torch.tensor(theirs["losses"]), atol=tolerance, rtol=0)
    assert ours["ranks"] == theirs["ranks"]
    torch.testing.assert_close(ours["logits"], theirs["logits"], atol=10 * tolerance, rtol=0)
    assert ours["lr"] == theirs["lr"]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", MODELS)
def test_growth_changes_no_logit_and_the_merged_model_is_the_same(name: str, choice: str) -> None:
    result = alone(name, STEPS, CHOICES[choice])
    assert "grow" in result["actions"] and "freeze" in result["actions"]
    assert choice == "decaying base" or result["jumps"]
    assert max(result["jumps"], default=0.0) < 1e-6
    assert max(result["ranks"].values()) > 2
    torch.testing.assert_close(result["merged"], result["logits"], atol=1e-5, rtol=0)
    assert result["losses"][-1] < result["losses"][0]


@pytest.mark.parametrize(
    ("name", "how", "world_size", "choice"),
    [
        ("gpt2", "fsdp", 2, "no base"),
        slow("llama", "fsdp", 3, "decaying base"),
        ("qwen3", "ddp", 2, "gradient"),
        ("own", "fsdp", 3, "no base"),
        ("own", "ddp", 2, "decaying base"),
        slow("llama", "hybrid", 4, "gradient"),
    ],
)
def test_every_sharding_gives_the_run_of_one_process(
    name: str, how: str, world_size: int, choice: str, pool: Pool
) -> None:
    arguments = (name, how, STEPS, CHOICES[choice])
    one = alone(name, STEPS, CHOICES[choice])
    for result in pool.run("library_checks:in_processes", *arguments, world_size=world_size, timeout=120):
        assert_same(result, one)
        torch.testing.assert_close(result["merged"], one["merged"], atol=1e-4, rtol=0)


# While ranks grow, and when they are frozen.
@pytest.mark.parametrize(("name", "at"), [("gpt2", 4), slow("own", 10), slow("gpt2", 10), slow("own", 4)])
def test_a_run_resumed_on_other_processes_is_the_straight_run(name: str, at: int, pool: Pool, tmp_path: Path) -> None:
    straight = alone(name, STEPS, {})
    pool.run("library_checks:in_processes", name, "fsdp", at, {}, str(tmp_path / "saved"), world_size=2, timeout=120)
    arguments = (name, "fsdp", STEPS, {}, "", str(tmp_path / "saved"))
    for result in pool.run("library_checks:in_processes", *arguments, world_size=3, timeout=120):
        result["losses"] = straight["losses"][:at] + result["losses"]
        assert_same(result, straight)


def test_state_dict_goes_to_another_run() -> None:
    first, second, third = (make_run("own") for _ in range(3))
    train(first, 8)
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    assert second.step == 8 and second.ranks == first.ranks
    results = [train(run, STEPS) for run in (first, second, third)]
    for result in results[1:]:
        result["losses"] = result["losses"][-4:]
        assert_same(result, {**results[0]})


def test_import_is_fast() -> None:
    """Nothing slow is imported before it is used."""
    code = "import sys, inrank_dist; assert 'torch' not in sys.modules; assert inrank_dist.InRank(['mlp']).mode"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_cannot_work_is_refused_at_construction() -> None:
    build = MODELS["own"][0]
    adamw = torch.optim.AdamW

    def refused(message: str, **changes: Any) -> None:
        arguments: dict[str, Any] = {"method": inrank.InRank([r"\.up$"]), "optimizer": lambda groups: adamw(groups)}
        steps, model = changes.pop("then", False), changes.pop("build", build)
        with pytest.raises(inrank.UserError, match=message):
            run = inrank.LowRankRun(model, **{**arguments, **changes})
            assert steps
            run.after_step()

    refused("amsgrad|max_exp_avg_sq", optimizer=lambda groups: adamw(groups, amsgrad=True))
    refused("square_avg", optimizer=lambda groups: torch.optim.RMSprop(groups))
    refused("tied", method=inrank.InRank(["head"]))
    refused("frozen", method=inrank.InRank(["frozen"]))
    refused("shared|same layer", method=inrank.InRank(["shared"]))
    refused("matches no", method=inrank.InRank(["nothing"]))
    refused("total_steps", method=inrank.InRank([r"\.up$"], freeze_step="auto"))
    refused("processes|needs gradients", method=inrank.InRank([r"\.up$"], growth_init="gradient"), then=True)
    refused(
        "total_steps is 7, but the method is for 9",
        method=inrank.PretrainThenFactorise(r"\.up$", steps=3, total_steps=9),
        total_steps=7,
    )
    for wrong in ({"base": "decya"}, {"criterion": "energi"}, {"measure": "updtae"}, {"init": "orthognal"}):
        (name,) = wrong
        with pytest.raises(inrank.UserError, match=f"lowrank.{name} is .*; write one of"):
            inrank.InRank(["mlp"], **wrong)
    assert inrank.InRank(["mlp"], freeze_step="auto").freeze_at(100)
    with pytest.raises(inrank.UserError, match="no setting 'treshold'; did you mean 'threshold'"):
        inrank.InRank(["mlp"], treshold=0.5)
    refused("write a function that makes it", build=build())
    refused("write a function, such as lambda groups: AdamW", optimizer=adamw([torch.zeros(1)]))


METHODS: dict[str, tuple[Callable[..., LowRankSettings], dict[str, int]]] = {
    "InRank": (inrank.InRank, {}),
    "FixedRank": (inrank.FixedRank, {}),
    "DeepLoRA": (inrank.DeepLoRA, {}),
    "PretrainThenFactorise": (inrank.PretrainThenFactorise, {"steps": 5, "total_steps": 10}),
    "Published": (inrank.Published, {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_called_alike(name: str) -> None:
    """The layers first, one or several; all else by the names of the settings."""
    method, needed = METHODS[name]
    assert method("all", initial_rank=3, **needed) == method(["all"], initial_rank=3, **needed)
    assert method(("mlp", "attention"), **needed).targets == ["mlp", "attention"]
    assert method("mlp", initial_rank=3, **needed).initial_rank == 3
    assert method(base="none", init="orthogonal", train_only_factors=False, **needed).base == "none"
    with pytest.raises(inrank.UserError, match=r"targets is 8; write names of layers, such as 'mlp'"):
        method(8, **needed)
    with pytest.raises(inrank.UserError, match="no setting 'rank'"):
        method("mlp", rank=8, **needed)


def test_shardings_that_cannot_work_are_refused_by_name(pool: Pool) -> None:
    """A factor cut along its rank, a mesh of some of the processes, and FSDP1, whose parameters are flat."""
    for said in pool.run("library_checks:refusals", world_size=4, timeout=60):
        across, part, flat = said
        assert "is placed as [Shard(dim=1)]" in across and "write a sharding by rows" in across
        assert "sharded over 2 of 4 processes; write a mesh of all of them" in part
        assert "FSDP1" in flat and "write torch.distributed.fsdp.fully_shard" in flat


@pytest.mark.slow
def test_the_loop_of_the_page(tmp_path: Path) -> None:
    """Under 60 lines, on two processes: ranks grow, are frozen, and the merged model is one of transformers."""
    loop = python_block("fully_shard")
    (tmp_path / "grow.py").write_text(loop)
    assert len(loop.splitlines()) < 60
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "grow.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert " grow {" in done.stdout and "20 freeze {" in done.stdout
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
