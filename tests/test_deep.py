"""Deep layers in runs: events on uneven shards, checkpoints, export, and the commands that show them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from runs import assert_same_run, short_config, train, trained_once
from sharing import nightly, slow

import inrank_dist
from inrank_dist.commands.common import load_trained
from inrank_dist.commands.main import Parser, main
from inrank_dist.config import Config
from inrank_dist.train.checkpoint import list_checkpoints

UNEVEN: dict[str, Any] = {
    "model__name": "llama",
    "model__hidden_size": 20,
    "model__num_kv_heads": 1,
    "model__intermediate_size": 7,
    "lowrank__initial_rank": 1,
    "lowrank__buffer": 2,
    "lowrank__targets": "[mlp]",
    "lowrank__depth": 4,
    "lowrank__init_scale": 0.5,
    "train__global_batch_size": 6,
    "train__micro_batch_size": 2,
}
"""Widths 20 and 7 and cores of 3 and more rows, over 2 and 3 processes."""


def deep_config(corpus: Path, **changes: Any) -> Config:
    return short_config(corpus, **{"lowrank__depth": 3, "lowrank__init_scale": 0.4, **changes})


@pytest.mark.parametrize("engine", ["fsdp", slow("zero3")])
def test_uneven_shards_give_the_run_of_one_process(pool: Pool, corpus: Path, engine: str) -> None:
    config = short_config(corpus, **UNEVEN)
    reference = trained_once(config)
    assert "grow" in [record["action"] for record in reference.of_kind("rank_event")]
    config.parallel.engine = engine
    for world_size in (2, 3):
        config.train.micro_batch_size = 6 // world_size
        assert_same_run(pool.run("runs:train_in_worker", config, world_size=world_size), reference, world_size)


@pytest.mark.slow
def test_replicas_of_shards_count_each_row_of_a_core_once(pool: Pool, corpus: Path) -> None:
    config = short_config(corpus, **UNEVEN | {"train__global_batch_size": 8, "train__micro_batch_size": 2})
    reference = trained_once(config)
    config.parallel.engine, config.parallel.shard_size = "fsdp", 2
    assert_same_run(pool.run("runs:train_in_worker", config, world_size=4), reference, 4)


@pytest.mark.nightly
def test_compiled_is_the_same(corpus: Path, tmp_path: Path) -> None:
    config = deep_config(corpus, model__num_layers=1, train__steps=9)
    plain = trained_once(config)
    config.train.compile, config.run.dir = True, str(tmp_path)
    assert train(config)[0].losses() == pytest.approx(plain.losses(), rel=1e-5)


@pytest.mark.parametrize(
    ("engine", "world_size"), [("local", 1), slow("fsdp", 2), nightly("ddp", 2), nightly("zero2", 2)]
)
def test_growth_changes_no_logit_and_the_freeze_only_what_it_discards(
    pool: Pool, corpus: Path, engine: str, world_size: int
) -> None:
    config = deep_config(corpus, parallel__engine=engine, lowrank__threshold=0.9, lowrank__multiple_of=1)
    for actions in pool.run("checks:growth_and_freeze", config, world_size=world_size):
        assert actions == ["grow", "grow", "freeze"]


@pytest.mark.parametrize(("engine", "world_size"), [slow("fsdp", 3), slow("zero3", 2)])
def test_every_parameter_moves_after_every_event(pool: Pool, corpus: Path, engine: str, world_size: int) -> None:
    batch = {"train__global_batch_size": 6, "train__micro_batch_size": 6 // world_size}
    config = deep_config(corpus, parallel__engine=engine, train__steps=10, **batch)
    assert pool.run("checks:every_parameter_moves", config, world_size=world_size) == [3] * world_size


COMPRESSED: dict[str, Any] = {
    "lowrank__depth": 5,
    "lowrank__mode": "fixed",
    "lowrank__base": "frozen",
    "lowrank__initial_rank": 7,
    "lowrank__outer_init": "gradient",
    "train__global_batch_size": 6,
}


@pytest.mark.parametrize(
    ("engine", "world_size", "gamma"),
    [("local", 1, 0.1), slow("fsdp", 3, 0.0), slow("zero3", 2, 0.1), nightly("ddp", 2, 0.0)],
)
def test_outer_factors_start_along_the_gradient(
    pool: Pool, corpus: Path, engine: str, world_size: int, gamma: float
) -> None:
    changes = {"parallel__engine": engine, "lowrank__outer_lr_scale": gamma, "train__steps": 2}
    config = short_config(corpus, **COMPRESSED, **changes, train__micro_batch_size=6 // world_size)
    for left, right in pool.run("checks:outer_factors_of_the_gradient", config, world_size=world_size):
        assert 0.8 < left <= 1 + 1e-6
        assert 0.8 < right <= 1 + 1e-6


@pytest.mark.parametrize("gamma", [0.0, slow(0.1)])
def test_the_compressed_form_on_uneven_shards(pool: Pool, corpus: Path, tmp_path: Path, gamma: float) -> None:
    """The same run on 1 and 3 processes, also when it is resumed on 2."""
    changes = {"lowrank__outer_lr_scale": gamma, "checkpoint__interval": 4, "run__dir": tmp_path}
    config = short_config(corpus, **COMPRESSED, **changes, train__micro_batch_size=2)
    reference = trained_once(config)
    config.parallel.engine = "fsdp"
    assert_same_run(pool.run("runs:train_in_worker", config, world_size=3), reference, 3)
    shutil.rmtree(list_checkpoints(tmp_path)[-1])
    config.train.micro_batch_size = 3
    rest = pool.run("runs:train_in_worker", config, True, world_size=2)
    assert rest[0].losses() == pytest.approx(reference.losses()[8:], rel=1e-5)


@pytest.mark.parametrize(("first", "then"), [(("fsdp", 2), ("fsdp", 3)), slow(("zero3", 2), ("local", 1))])
def test_resumed_on_other_processes(
    pool: Pool, corpus: Path, tmp_path: Path, first: tuple[str, int], then: tuple[str, int]
) -> None:
    settings: dict[str, Any] = UNEVEN | {"run__dir": tmp_path, "checkpoint__interval": 6}

    def results(engine: str, world_size: int, resume: bool) -> list[Any]:
        sizes = {"parallel__engine": engine, "train__micro_batch_size": 6 // world_size}
        return pool.run("runs:train_in_worker", short_config(corpus, **settings | sizes), resume, world_size=world_size)

    whole = results(*first, False)
    shutil.rmtree(list_checkpoints(tmp_path)[-1])
    rest = results(*then, True)
    assert rest[0].losses() == pytest.approx(whole[0].losses()[6:], rel=1e-6)
    assert rest[0].table == whole[0].table


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a frozen base whose layers have grown and were frozen."""
    folder = tmp_path_factory.mktemp("deep") / "run"
    config = deep_config(
        corpus, run__dir=folder, lowrank__base="frozen", lowrank__freeze_step=9, checkpoint__interval=4
    )
    train(config)
    folder.with_suffix(".yaml").write_text(config.to_yaml())
    return folder


def loaded(run: Path) -> Any:
    arguments = Parser().parse_args([])
    arguments.run, arguments.step = run, None
    return load_trained(arguments)


@torch.no_grad()
def test_exported_dense_and_with_factors(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = loaded(run)
    ids = torch.randint(301, (20, 16), generator=torch.Generator().manual_seed(0))
    for form, words in (("factors", ()), ("hf", ())):
        out = tmp_path / form
        assert main(["export", "--run", str(run), "--output", str(out), "--format", form, *words]) == 0
    model = inrank_dist.load(tmp_path / "factors")
    assert torch.equal(model(ids), ours.model(ids))
    assert model.get_submodule("blocks.0.mlp.up").depth == 3
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(theirs(ids).logits, ours.model(ids), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_cut_leaves_two_factors(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", "--run", str(run), "--output", str(out), "--format", "factors", "--rank", "1"]) == 0
    model, ours = inrank_dist.load(out), loaded(run).model
    layer, uncut = (each.get_submodule("blocks.0.mlp.up") for each in (model, ours))
    assert (layer.depth, layer.modes) == (2, 1)
    U, S, Vh = torch.linalg.svd(uncut.weight(torch.float64) - uncut.base.double())
    update = layer.weight(torch.float64) - layer.base.double()
    torch.testing.assert_close(update, S[0] * torch.outer(U[:, 0], Vh[0]), rtol=0, atol=1e-6)


def test_inspect_counts_the_cores(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", "--run", str(run)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("blocks.0.mlp.up")).split()
    out, in_, rank = int(row[1]), int(row[3]), int(row[6])
    assert int(row[10]) == rank * (out + in_) + rank**2 + out * in_


def test_plan_counts_the_cores(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = {}
    for depth in (2, 3):
        file = tmp_path / f"{depth}.yaml"
        changes = {"model__hidden_size": 256, "lowrank__initial_rank": 126, "lowrank__mode": "fixed"}
        file.write_text(deep_config(corpus, lowrank__depth=depth, **changes).to_yaml())
        capsys.readouterr()
        assert main(["plan", "--config", str(file), "--world-size", "1"]) == 0
        found = re.search(r"parameters +([\d.]+)M +([\d.]+)M +([\d.]+)M", capsys.readouterr().out)
        assert found
        parameters[depth] = float(found[3])
    assert parameters[3] - parameters[2] == pytest.approx(12 * 126**2 / 1e6, abs=0.11)


def test_muon_for_pairs_is_refused_in_one_line(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"write optimizer\.name: adamw, or lowrank\.depth: 2"):
        deep_config(corpus, optimizer__name="spectron")


def test_the_depth_of_a_run_stays(corpus: Path, run: Path, fails: Any) -> None:
    words = ["--lowrank.depth", "4", "--allow-change", "lowrank.depth"]
    assert "lowrank.depth" in fails("train", "--config", run.with_suffix(".yaml"), *words)


@pytest.mark.parametrize("outer_init", ["random", "gradient"])
def test_deep_updates_in_a_loop_of_your_own(outer_init: str) -> None:
    """A frozen dense model with the loaded weights, a deep update that learns, and a dense model in the end."""
    torch.manual_seed(0)

    def make() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 9))

    loaded, x, y = make(), torch.randn(64, 12), torch.randn(64, 9)
    method = inrank_dist.DeepLoRA(
        r"^\d", initial_rank=4, outer_init=outer_init, outer_lr_scale=float(outer_init == "random")
    )
    run = inrank_dist.LowRankRun(make, method, lambda groups: torch.optim.AdamW(groups, lr=1e-2), initial=loaded)

    def backward() -> float:
        loss = (run.model(x) - y).square().mean()
        loss.backward()
        return float(loss.detach())

    if outer_init == "gradient":
        with pytest.raises(ValueError, match=r"write run\.start"):
            run.after_step()
        run.start(backward)
    factors = {"0.C1", "2.C1"} if outer_init == "gradient" else {f"{i}.{f}" for i in (0, 2) for f in ("U", "V", "C1")}
    assert {name for name, p in run.model.named_parameters() if p.requires_grad} == factors
    losses = []
    for _ in range(40):
        losses.append(backward())
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.after_step()
    # The first forward pass is nearly that of the loaded model: the update starts at 0.1 to the power of its depth.
    assert losses[0] == pytest.approx(
        float((loaded(x) - y).detach().square().mean()), rel=0.3 if outer_init == "gradient" else 0.01
    )
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(run.model.get_parameter("0.base"), loaded[0].weight)
    assert torch.equal(run.model.get_parameter("2.bias"), loaded[2].bias)
    torch.testing.assert_close(run.merge()(x), run.model(x))


def test_deep_layers_grow_and_freeze_in_a_loop_of_your_own() -> None:
    """A state saved between two events continues bit for bit in a new run."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 12), torch.randn(64, 9)

    def make() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 9))

    def started() -> Any:
        method = inrank_dist.InRank(
            [r"^\d"], initial_rank=1, buffer=2, interval=3, freeze_step=9, base="none", depth=4, multiple_of=1
        )
        return inrank_dist.LowRankRun(make, method, lambda groups: torch.optim.AdamW(groups, lr=1e-2))

    def train(run: Any, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = (run.model(x) - y).square().mean()
            loss.backward()
            losses.append(float(loss.detach()))
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.after_step()
        return losses

    run = started()
    train(run, 7)
    assert max(run.ranks.values()) > 1
    saved = {name: tensor.clone() for name, tensor in run.state_dict().items()}
    again = started()
    again.load_state_dict(saved)
    assert train(again, 6) == train(run, 6)
    assert run.frozen
    torch.testing.assert_close(run.merge()(x), run.model(x))


@pytest.mark.parametrize(("rank", "examples"), [(7, 1), (9, 2), (9, 64)])
def test_outer_factors_of_a_gradient_of_low_rank_are_orthonormal(rank: int, examples: int) -> None:
    """One example has a gradient of rank 1, and 9 columns are all that there are."""
    torch.manual_seed(0)

    def make() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(9, 20))

    loaded, x, y = make(), torch.randn(examples, 9), torch.randn(examples, 20)
    method = inrank_dist.DeepLoRA("0", initial_rank=rank, outer_init="gradient")
    run = inrank_dist.LowRankRun(make, method, torch.optim.AdamW, initial=loaded)
    run.start(lambda: (run.model(x) - y).square().mean().backward())
    U, V = (run.model.get_parameter(name).detach().double() for name in ("0.U", "0.V"))
    for factor in (U, V):
        torch.testing.assert_close(factor.T @ factor, torch.eye(rank).double(), rtol=0, atol=1e-6)
    gradient = (loaded(x) - y).detach().double().T @ x.double()
    left, _, right = torch.linalg.svd(gradient)
    half = (rank + 1) // 2
    assert float((V[:, :half].T @ right[0]).norm()) == pytest.approx(1, abs=1e-3)
    assert float((U[:, half:].T @ left[:, 0]).norm()) == pytest.approx(1, abs=1e-3)


def test_rates_of_a_loop_of_your_own_are_not_scaled() -> None:
    method = inrank_dist.DeepLoRA("0", initial_rank=2, outer_lr_scale=0.1)
    with pytest.raises(ValueError, match="write 0 to fix U and V, or 1"):
        inrank_dist.LowRankRun(lambda: torch.nn.Sequential(torch.nn.Linear(4, 4)), method, torch.optim.AdamW)


@pytest.mark.slow
def test_the_config_fine_tunes_the_quickstart(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the commands of the page, smaller: the update learns, and the loaded weights stay."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-text").mkdir()
    for file in (corpus / "corpus").glob("*.txt"):
        shutil.copy(file, tmp_path / "my-text")
    smaller = ["--model.num_layers=2", "--model.num_heads=2", "--model.hidden_size=32", "--model.max_seq_len=32"]
    first = ["--train.steps=6", "--lowrank.interval=2", "--lowrank.warmup_steps=4", "--schedule.warmup_steps=2"]
    first += ["--eval.interval=0", "--eval.sample_tokens=0", "--data.max_bytes=300000", "--tokenizer.vocab_size=400"]
    first += ["--checkpoint.interval=0", "--lowrank.final=per_layer"]
    configs = Path(__file__).parents[1] / "configs"
    assert main(["train", "--config", str(configs / "quickstart.yaml"), *smaller, *first]) == 0
    (checkpoint,) = list_checkpoints(tmp_path / "runs/quickstart")
    then = [f"--tokenizer.path={checkpoint / 'tokenizer.model'}", "--eval.sample_tokens=0", "--train.steps=30"]
    then += ["--tokenizer.vocab_size=400", "--data.validation_fraction=0.2", "--eval.batches=1", "--eval.interval=0"]
    assert main(["train", "--config", str(configs / "deep-lora.yaml"), *smaller, *then]) == 0
    before, after = loaded(tmp_path / "runs/quickstart").model, loaded(tmp_path / "runs/deep-lora").model
    for name, module in after.named_modules():
        if isinstance(module, inrank_dist.LowRankLayer):
            old = before.get_submodule(name)
            weight = old.weight(torch.float64) if isinstance(old, inrank_dist.LowRankLayer) else old.weight
            torch.testing.assert_close(module.base, weight.float())
            assert module.depth == 3
    for name, parameter in before.named_parameters():
        if name.rpartition(".")[2] not in ("U", "V", "base", "weight") or "norm" in name or "embed" in name:
            assert torch.equal(parameter, after.get_parameter(name)), name
    lines = (tmp_path / "runs/deep-lora/metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if record["kind"] == "step"]
    assert losses[-1] < losses[0] - 0.05
