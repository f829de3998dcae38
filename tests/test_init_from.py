"""Runs that start from the weights of another model."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from runs import Fails, assert_same_run, small_config, train, trained_once, trainer_of
from safetensors.torch import load_file, save_file
from sharing import slow
from test_export import GROUPED, HF_GPT2, OF_HF, QWEN3, export, loaded, prompts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import inrank_dist
from inrank_dist.config import Config
from inrank_dist.data import prepare
from inrank_dist.data.settings import TokenizerSettings
from inrank_dist.data.tokenizer import train_tokenizer
from inrank_dist.lowrank.layer import LowRankLayer
from inrank_dist.runtime.context import Context
from inrank_dist.runtime.errors import UserError
from inrank_dist.train.evaluation import validation_loss

RUNS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": GROUPED | {"model__tie_embeddings": "true"},
    "qwen3": OF_HF | {"model__config": QWEN3},
    "gpt2 of transformers": OF_HF | {"model__config": HF_GPT2},
}
LOADED = {"lowrank__init": "loaded"}
FIXED = LOADED | {"lowrank__mode": "fixed", "lowrank__base": "none"}
FROZEN = LOADED | {"lowrank__base": "frozen"}


class Source:
    """A run, its changes of the small settings, and its exports."""

    def __init__(self, folder: Path, corpus: Path, changes: dict[str, Any]) -> None:
        self.corpus, self.changes, self.run = corpus, changes, folder / "run"
        train(small_config(corpus, run__dir=self.run, checkpoint__interval=30, **changes))
        self.folders = {
            "transformers": export(self.run, folder / "hf"),
            "split": export(self.run, folder / "split", "--max-shard-size", "50KB"),
            "factors": export(self.run, folder / "factors", "--format", "factors"),
            "run": self.run,
        }
        trained = loaded(self.run)
        self.tokenizer = trained.checkpoint.tokenizer_file
        self.vocab_size, self.model = trained.tokenizer.vocab_size, trained.model

    def config(self, kind: str, run: Path, **changes: Any) -> Config:
        loading = {"model__init_from": self.folders[kind], "tokenizer__path": self.tokenizer}
        return small_config(self.corpus, run__dir=run, **self.changes | loading | changes)


@pytest.fixture(scope="module", params=["gpt2", slow("llama"), "qwen3", slow("gpt2 of transformers")])
def source(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(tmp_path_factory.mktemp("source"), corpus, RUNS[request.param])


@pytest.fixture(scope="module")
def gpt2(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(tmp_path_factory.mktemp("gpt2"), corpus, {})


@torch.no_grad()
def logits_at_the_start(config: Config, ids: Tensor) -> tuple[Tensor, Any]:
    context = Context()
    context.start(60)
    try:
        trainer = trainer_of(config, context)
        trainer.engine.model.eval()
        return trainer.engine.logits(ids), trainer.engine
    finally:
        context.stop()


@pytest.mark.parametrize("kind", ["transformers", "split", "factors", "run"])
def test_full_rank_goes_on_with_the_same_function(source: Source, tmp_path: Path, kind: str) -> None:
    ids = prompts(source.vocab_size, 50)
    found, _ = logits_at_the_start(source.config(kind, tmp_path / "run", lowrank__mode="full"), ids)
    torch.testing.assert_close(found, source.model(ids), rtol=0, atol=2e-6)


def test_the_validation_loss_is_the_same(source: Source, tmp_path: Path) -> None:
    """After a step with a rate that moves nothing, as ``inrank eval`` computes it."""

    def validation(run: Path) -> float:
        trained = loaded(run)
        config = trained.config
        data = prepare(config.data, config.tokenizer, config.model.max_seq_len, progress=False)
        found = validation_loss(data, trained.model, batch_size=4, max_sequences=None, device=torch.device("cpu"))
        assert found is not None
        return found.loss

    expected = validation(source.run)
    still = {"train__steps": 1, "checkpoint__interval": 1, "optimizer__lr": 1e-12}
    train(source.config("transformers", tmp_path / "full", **still, lowrank__mode="full"))
    assert validation(tmp_path / "full") == pytest.approx(expected, rel=0, abs=1e-6)
    train(source.config("transformers", tmp_path / "fixed", **FIXED | still, lowrank__initial_energy=1.0))
    assert validation(tmp_path / "fixed") == pytest.approx(expected, rel=0, abs=1e-4)


def test_a_rank_is_the_best_approximation(source: Source, tmp_path: Path) -> None:
    ids = prompts(source.vocab_size, 50)
    whole, _ = logits_at_the_start(
        source.config("transformers", tmp_path / "a", **FIXED, lowrank__initial_energy=1.0), ids
    )
    torch.testing.assert_close(whole, source.model(ids), rtol=0, atol=1e-4)
    cut, engine = logits_at_the_start(
        source.config("transformers", tmp_path / "b", **FIXED | {"lowrank__initial_rank": 2}), ids
    )
    assert not torch.allclose(cut, whole, atol=1e-3)
    for name, layer in engine.module.named_modules():
        if isinstance(layer, LowRankLayer):
            trained = source.model.get_submodule(name).weight(torch.float64)
            U, sigma, Vh = torch.linalg.svd(trained)
            torch.testing.assert_close(layer.weight(torch.float64), (U[:, :2] * sigma[:2]) @ Vh[:2], rtol=0, atol=1e-6)


def test_documents_may_be_kept_apart_from_now_on(gpt2: Source, tmp_path: Path) -> None:
    """It changes no parameter."""
    config = gpt2.config("run", tmp_path, lowrank__mode="full", model__mask_documents="true")
    logits_at_the_start(config, prompts(gpt2.vocab_size, 2))


def test_what_a_run_was_loaded_from_cannot_change(gpt2: Source, tmp_path: Path, fails: Fails) -> None:
    """Else nobody would know what its weights were at the start, which lowrank.track_updates needs."""
    still = {"lowrank__mode": "full", "train__steps": 1, "checkpoint__interval": 1}
    config = gpt2.config("run", tmp_path / "run", **still)
    train(config)
    config.model.init_from = None
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    words = ["--train.steps", "2", "--allow-change", "train.steps", "--allow-change", "model.init_from"]
    error = fails("train", "--config", tmp_path / "config.yaml", *words)
    assert "was trained with model.init_from" in error and "which cannot change within a run" in error


@pytest.mark.slow
def test_an_energy_finds_the_rank_of_each_layer(pool: Pool, gpt2: Source, tmp_path: Path) -> None:
    config = gpt2.config("transformers", tmp_path / "run", **FIXED, lowrank__initial_energy=0.8, train__steps=4)
    reference = trained_once(config)
    for name, (rank, _, _) in reference.table.items():
        energy = torch.linalg.svdvals(gpt2.model.get_submodule(name).weight(torch.float64)).square().cumsum(0)
        assert rank == int((energy < 0.8 * energy[-1]).sum()) + 1
    assert len({rank for rank, _, _ in reference.table.values()}) > 1
    sharded = gpt2.config(
        "run", tmp_path / "sharded", **FIXED, lowrank__initial_energy=0.8, train__steps=4, parallel__engine="fsdp"
    )
    assert_same_run(pool.run("runs:train_in_worker", sharded, world_size=2), reference, 2)


@pytest.mark.slow
def test_a_frozen_base_grows_an_update(pool: Pool, gpt2: Source, tmp_path: Path) -> None:
    """The function starts as the loaded one; then the update grows and is frozen, sharded as in one process."""
    ids = prompts(gpt2.vocab_size, 50)
    found, _ = logits_at_the_start(gpt2.config("transformers", tmp_path / "start", **FROZEN), ids)
    torch.testing.assert_close(found, gpt2.model(ids), rtol=0, atol=2e-6)
    reference = trained_once(gpt2.config("transformers", tmp_path / "run", **FROZEN))
    assert any(rank > 1 for rank, _, _ in reference.table.values())
    for kind in ("transformers", "factors"):
        config = gpt2.config(kind, tmp_path / kind, **FROZEN, parallel__engine="fsdp")
        assert_same_run(pool.run("runs:train_in_worker", config, world_size=2), reference, 2)


def test_a_resumed_run_does_not_read_the_folder(gpt2: Source, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(gpt2.folders["transformers"], copy)
    config = gpt2.config("transformers", tmp_path / "run", **FROZEN, checkpoint__interval=8, checkpoint__keep=9)
    config.model.init_from = str(copy)
    straight, _ = train(config)
    for step in (24, 30):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    shutil.rmtree(copy)
    resumed, _ = train(config, resume=True)
    assert resumed.losses() == straight.losses()[-len(resumed.losses()) :]


def test_weights_without_the_prefix_of_the_base_model(gpt2: Source, tmp_path: Path) -> None:
    """As in the published GPT-2, which also holds masks."""
    folder = tmp_path / "published"
    shutil.copytree(gpt2.folders["transformers"], folder)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 16, 16)}, folder / "model.safetensors")
    ids = prompts(gpt2.vocab_size, 20)
    config = gpt2.config("transformers", tmp_path / "run", lowrank__mode="full")
    config.model.init_from = str(folder)
    torch.testing.assert_close(logits_at_the_start(config, ids)[0], gpt2.model(ids), rtol=0, atol=2e-6)


def test_the_whole_file_counts_where_a_stale_index_is_left(gpt2: Source, tmp_path: Path) -> None:
    """As transformers reads such a folder."""
    folder = tmp_path / "both"
    shutil.copytree(gpt2.folders["split"], folder)
    for file in folder.glob("model-*.safetensors"):
        save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)
    shutil.copy(gpt2.folders["transformers"] / "model.safetensors", folder)
    config = gpt2.config("transformers", tmp_path / "run", lowrank__mode="full")
    config.model.init_from = str(folder)
    ids = prompts(gpt2.vocab_size, 20)
    torch.testing.assert_close(logits_at_the_start(config, ids)[0], gpt2.model(ids), rtol=0, atol=2e-6)


def test_a_gpt2_as_transformers_configures_it(gpt2: Source, tmp_path: Path) -> None:
    """It leaves the width of the MLP out, and has keys that change nothing."""
    folder = tmp_path / "plain"
    shutil.copytree(gpt2.folders["transformers"], folder)
    edited(folder, n_inner=None, id2label={"0": "a"}, summary_type="x", attn_pdrop=0.3)
    config = gpt2.config("transformers", tmp_path / "run", lowrank__mode="full")
    config.model.init_from = str(folder)
    ids = prompts(gpt2.vocab_size, 20)
    torch.testing.assert_close(logits_at_the_start(config, ids)[0], gpt2.model(ids), rtol=0, atol=2e-6)


def test_tokens_must_mean_the_same(gpt2: Source, tmp_path: Path, fails: Fails) -> None:
    """A tokenizer of the same size with other tokens would give each row of the embedding another meaning."""
    text = (Path(__file__).parent / "reference.py").read_text()
    other = train_tokenizer([text], TokenizerSettings(vocab_size=gpt2.vocab_size + 50))
    other.save(tmp_path / "other.model")
    for path, said in (
        ("null", "tokenizer.path is null, so a tokenizer with other tokens would be trained; write the tokenizer.path"),
        (tmp_path / "other.model", f"trained with another tokenizer; write tokenizer.path: {gpt2.tokenizer}"),
    ):
        config = gpt2.config("run", tmp_path / "run", lowrank__mode="full", tokenizer__vocab_size=gpt2.vocab_size + 50)
        config.model.vocab_size = gpt2.vocab_size + 50
        (tmp_path / "config.yaml").write_text(config.to_yaml())
        assert said in fails("train", "--config", tmp_path / "config.yaml", "--tokenizer.path", path)


def test_weights_that_are_not_finite(gpt2: Source, tmp_path: Path) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(gpt2.folders["transformers"], folder)
    more(folder, "transformer.h.1.mlp.c_fc.weight", torch.full((32, 128), torch.nan))
    config = gpt2.config("transformers", tmp_path / "run", **FIXED)
    config.model.init_from = str(folder)
    with pytest.raises(
        UserError, match=r"blocks.1.mlp.up of the loaded model cannot be factored: the weight is not fin"
    ):
        logits_at_the_start(config, prompts(gpt2.vocab_size, 2))


def test_a_model_that_transformers_saved_in_bfloat16(gpt2: Source, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(gpt2.folders["transformers"]).bfloat16()
    theirs.save_pretrained(tmp_path / "bf16")
    config = gpt2.config("transformers", tmp_path / "run", lowrank__mode="full")
    config.model.init_from = str(tmp_path / "bf16")
    ids = prompts(gpt2.vocab_size, 20)
    with torch.no_grad():
        expected = theirs.float()(ids).logits
    torch.testing.assert_close(logits_at_the_start(config, ids)[0], expected, rtol=0, atol=2e-6)


def ranks(name: str = "blocks.0.mlp.up", **changes: Any) -> dict[str, Any]:
    """Layers of a description."""
    return {name: {"shape": [128, 32], "rank": 2, "modes": 2, "base": False} | changes}


def edited(folder: Path, name: str = "config.json", **changes: Any) -> None:
    content = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("kind", "damage", "said"),
    [
        ("transformers", lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
        ("transformers", lambda f: (f / "config.json").write_text("{"), "is not a JSON object of at most 64 MiB"),
        ("transformers", lambda f: os.truncate(f / "config.json", 1 << 40), "is not a JSON object of at most 64 MiB"),
        (
            "transformers",
            lambda f: edited(f, model_type="llama"),
            "holds a llama, where the settings make a gpt2; write",
        ),
        ("transformers", lambda f: edited(f, layer_norm_epsilon=0.1), "has layer_norm_epsilon 0.1, where the settings"),
        ("transformers", lambda f: edited(f, activation_function="relu"), "has activation_function 'relu', where the"),
        (
            "transformers",
            lambda f: edited(f, n_head=4),
            "has n_head 4, where the settings make 2; write the settings of",
        ),
        ("transformers", lambda f: os.truncate(f / "model.safetensors", 9999), "model.safetensors is damaged"),
        ("transformers", lambda f: torch.save({}, f / "model.safetensors"), "model.safetensors is damaged"),
        (
            "transformers",
            lambda f: os.rename(f / "model.safetensors", f / "pytorch_model.bin"),
            "holds only pytorch_model.bin, a pickle that could execute code; write a folder with weights in",
        ),
        ("transformers", lambda f: lacks(f, "transformer.h.1.ln_1.bias"), "holds no transformer.h.1.ln_1.bias, which"),
        ("transformers", lambda f: more(f, "evil", torch.zeros(2)), "holds evil, which the settings do not make"),
        ("transformers", lambda f: more(f, "transformer.ln_f.bias", torch.zeros(2)), "as [2], where the settings make"),
        (
            "transformers",
            lambda f: more(f, "transformer.ln_f.bias", torch.zeros(32).int()),
            "as I32; write a folder with",
        ),
        ("split", lambda f: edited(f, "model.safetensors.index.json", weight_map={"a": "../evil"}), "names the file"),
        ("split", lambda f: edited(f, "model.safetensors.index.json", weight_map=[]), "has no weight_map"),
        ("split", lambda f: next(f.glob("*-00002-*")).unlink(), "cannot be read"),
        ("factors", lambda f: os.truncate(f / "model.safetensors", 9999), "model.safetensors is damaged"),
        (
            "factors",
            lambda f: edited(f, "inrank.json", base_scale=float("nan")),
            "is damaged (ValueError: base_scale nan)",
        ),
        ("factors", lambda f: edited(f, "inrank.json", base_scale="1"), "is damaged (ValueError: base_scale '1')"),
        ("factors", lambda f: edited(f, "inrank.json", vocab_size=10**30), "is damaged (ValueError: vocab_size 1000"),
        (
            "factors",
            lambda f: edited(f, "inrank.json", layers=ranks(modes=2**62)),
            "has a rank of blocks.0.mlp.up that",
        ),
        ("factors", lambda f: edited(f, "inrank.json", layers=ranks("evil")), "has a rank of evil that"),
        ("factors", lambda f: edited(f, "inrank.json", vocab_size=300), "has a vocabulary of 300 tokens, not 301"),
        ("run", lambda f: shutil.rmtree(f / "checkpoints"), "config.json cannot be read"),
    ],
)
def test_a_folder_that_is_refused(
    gpt2: Source, tmp_path: Path, fails: Fails, kind: str, damage: Any, said: str
) -> None:
    """Before anything is prepared or written."""
    shutil.copytree(gpt2.folders[kind], tmp_path / "copy")
    damage(tmp_path / "copy")
    config = gpt2.config(kind, tmp_path / "run", lowrank__mode="full")
    config.model.init_from = str(tmp_path / "copy")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    error = fails("train", "--config", tmp_path / "config.yaml")
    assert error.startswith("model.init_from: ") and said in error
    assert not (tmp_path / "run").exists()


def lacks(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def more(folder: Path, name: str, tensor: Tensor) -> None:
    save_file(load_file(folder / "model.safetensors") | {name: tensor}, folder / "model.safetensors")


@torch.no_grad()
def test_the_library_cuts_a_loaded_model_or_grows_an_update() -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({"mlp": nn.Linear(12, 8)})

    def started(method: inrank_dist.LowRankSettings) -> nn.Module:
        return inrank_dist.LowRankRun(model, method, torch.optim.AdamW, initial=trained).merge()

    trained = model()
    weight = trained["mlp"].weight  # type: ignore[index]
    U, sigma, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    best = ((U[:, :3] * sigma[:3]) @ Vh[:3]).float()
    cut, grown = (
        started(method)["mlp"].weight  # type: ignore[index]
        for method in (
            inrank_dist.FixedRank("mlp$", initial_rank=3, init="loaded"),
            inrank_dist.InRank(["mlp$"], base="frozen", init="loaded", initial_rank=1, buffer=2),
        )
    )
    torch.testing.assert_close(cut, best)
    assert torch.equal(grown, weight)
    with pytest.raises(UserError, match="initial_energy is a setting of the trainer; write initial_rank"):
        started(inrank_dist.FixedRank("mlp$", init="loaded", initial_energy=0.9))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__num_layers": 3}, "has model.num_layers 2, not 3; write model.num_layers: 2"),
        ({"lowrank__mode": "full", "model__layer_crossing": "true"}, "has model.layer_crossing False, not True"),
    ],
)
def test_settings_of_another_model(
    gpt2: Source, tmp_path: Path, fails: Fails, changes: dict[str, Any], said: str
) -> None:
    config = gpt2.config("run", tmp_path / "run", **FROZEN | changes)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert said in fails("train", "--config", tmp_path / "config.yaml")
