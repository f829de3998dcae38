"""Models of transformers in the trainer: values, loss, the same run on every engine, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huggingface_checks import ours_of, with_values
from pool import Pool
from runs import Fails, assert_same_run, short_config, tensor_bytes, train_in_worker, trained_once
from sharing import nightly, slow
from torch import Tensor, nn

from inrank_dist.commands.main import main
from inrank_dist.config import Config
from inrank_dist.models import ModelSettings, flops_per_token, huggingface, loss
from inrank_dist.models.huggingface import HuggingFaceLM, build
from inrank_dist.models.loss import ChunkedLoss, LossHead, summed_loss
from inrank_dist.runtime.errors import UserError
from inrank_dist.train.building import dense_skeleton
from inrank_dist.train.memory import peak_extra_bytes

VOCAB = 301
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
MLP = {"intermediate_size": 48}
GROUPED = {**SIZES, **MLP, "num_key_value_heads": 1, "head_dim": 24}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": SIZES,
    "llama": {**SIZES, **MLP},
    "qwen3": {**GROUPED, "tie_word_embeddings": True},
    "mistral": GROUPED,
    "gpt_neox": {**SIZES, **MLP},
    "gemma": GROUPED,
    "openai-gpt": SIZES,
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
}
"""openai-gpt leaves its Conv1D to their constructor; mamba has parameters that are no matrices."""


def settings(model_type: str, **changes: Any) -> ModelSettings:
    """A model of two blocks."""
    config = {"model_type": model_type, **MODELS.get(model_type, GROUPED), **changes}
    return ModelSettings(name="hf", config=config, max_seq_len=16)


def skeleton(model_type: str, **changes: Any) -> HuggingFaceLM:
    model = dense_skeleton(settings(model_type, **changes), VOCAB)
    assert isinstance(model, HuggingFaceLM)
    return model


def really_built(model: HuggingFaceLM) -> Any:
    """The same model as transformers builds it."""
    assert isinstance(model.settings.config, dict)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(model.settings.config, model.vocab_size).eval()


def tokens(seed: int, length: int = 16) -> Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


# Initial values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODELS)
def test_values_are_distributed_as_those_of_transformers(model_type: str) -> None:
    """Of every parameter: a norm that starts at one where zero is meant, or a missing scale of the residual layers, is
    seen in no loss curve by itself."""
    model = skeleton(model_type, hidden_size=128)
    real, values = really_built(model), model.initial_values(3)
    expected = {f"model.{name}": parameter for name, parameter in real.named_parameters()}
    assert dict(model.named_parameters()).keys() == expected.keys()
    for name, parameter in model.named_parameters():
        value, theirs = values.parameter(name), expected[name].detach()
        assert value.shape == parameter.shape and value.dtype == torch.float32
        assert value.numel() == theirs.numel()
        if theirs.std() == 0 or theirs.numel() == 1:
            assert torch.equal(value, theirs), name
        else:
            assert float(value.std()) == pytest.approx(float(theirs.std()), rel=0.06), name
            assert abs(value.mean() - theirs.mean()) < 0.1 * theirs.std(), name
            assert values.std(name) == pytest.approx(float(value.square().mean().sqrt()))
    buffers = {f"model.{name}": buffer for name, buffer in real.named_buffers()}
    assert dict(model.named_buffers()).keys() == buffers.keys()
    for name, buffer in buffers.items():
        assert torch.equal(values.buffer(name), buffer), name


def test_a_value_depends_on_seed_and_name_alone() -> None:
    """Processes ask in different orders, and for some names only."""
    model = skeleton("gpt2")
    names = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    first, second, other = (model.initial_values(seed) for seed in (0, 0, 1))
    state = torch.get_rng_state()
    values = {name: first.parameter(name) for name in names}
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    for name in reversed(names):
        assert torch.equal(second.parameter(name), values[name])
    drawn = [name for name in names if values[name].std() > 0]
    assert all(not torch.equal(other.parameter(name), values[name]) for name in drawn)
    pair = [values[f"model.transformer.h.{index}.mlp.c_fc.weight"] for index in (0, 1)]
    assert not torch.equal(*pair)


def test_layers_that_scale_their_residual_start_smaller() -> None:
    values = skeleton("gpt2", hidden_size=128).initial_values(0)
    assert values.std("model.transformer.h.1.mlp.c_proj.weight") == pytest.approx(0.02 / 2, rel=0.05)
    assert values.std("model.transformer.h.1.mlp.c_fc.weight") == pytest.approx(0.02, rel=0.05)


# Logits and loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [*MODELS, "gemma2"])
def test_logits_and_loss_are_those_of_transformers(model_type: str) -> None:
    """With the same weights, Conv1D's transposed; gemma2 caps its logits after the output layer."""
    model = with_values(skeleton(model_type))
    real = really_built(model)
    with torch.no_grad():
        for name, parameter in real.named_parameters():
            value = model.get_parameter(f"model.{name}")
            parameter.copy_(value.T if parameter.shape != value.shape or _is_conv1d(real, name) else value)
    inputs, targets = tokens(1), tokens(2)
    targets[0, :3] = -100
    logits = model(inputs)
    torch.testing.assert_close(logits, real(input_ids=inputs).logits, rtol=1e-5, atol=1e-6)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(inputs, targets), expected)
    assert isinstance(model.model.get_output_embeddings(), LossHead) == (model_type != "gemma2")
    with pytest.raises(ValueError, match=r"17 tokens is longer than model\.max_seq_len 16"):
        model(tokens(1, 17))


def _is_conv1d(model: nn.Module, name: str) -> bool:
    place, _, leaf = name.rpartition(".")
    return leaf == "weight" and type(model.get_submodule(place)).__name__ == "Conv1D"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("chunk", [VOCAB, 7 * VOCAB, 100 * VOCAB])
def test_the_loss_in_chunks_is_that_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, bias: bool, bf16: bool, chunk: int
) -> None:
    """Loss and gradients; chunks of 1, 7 and all 32 tokens; times a factor, as the engines scale it."""
    torch.manual_seed(0)
    head = LossHead.of(nn.Linear(24, VOCAB, bias=bias))
    x, targets = torch.randn(2, 16, 24, requires_grad=True), tokens(2)
    targets[1, 5:9] = -100

    def results() -> list[Tensor]:
        head.zero_grad()
        x.grad = None
        head.targets = targets
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            total = head(x)
        head.targets = None
        (total * 0.25).backward()
        return [total.detach(), *(p.grad for p in (x, *head.parameters()) if p.grad is not None)]

    expected = results()
    monkeypatch.setattr(loss, "CHUNK", chunk if chunk < 32 * VOCAB else 32 * VOCAB - 1)
    found = results()
    assert len(found) == 3 + bias
    assert found[0].dtype == torch.float32 and all(each.dtype == torch.float32 for each in found)
    if not bf16:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    else:
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).norm() < 1e-2 * theirs.norm()
    with torch.no_grad():
        head.targets = targets
        torch.testing.assert_close(head(x), summed_loss(F.linear(x, head.weight, head.bias), targets))


def test_a_frozen_output_layer_takes_no_gradient() -> None:
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    total = ChunkedLoss.apply(x, weight, None, torch.arange(5), True)
    total.backward()
    assert x.grad is not None and weight.grad is None


def test_the_loss_of_a_large_vocabulary_does_not_hold_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 2**20)
    head = LossHead.of(nn.Linear(4, 20_000, bias=False))
    x, targets = torch.randn(1, 800, 4, requires_grad=True), torch.randint(20_000, (1, 800))

    def work() -> None:
        head.targets = targets
        head(x).backward()

    assert peak_extra_bytes(work, torch.device("cpu")) < 0.2 * targets.numel() * 20_000 * 4


# Runs -----------------------------------------------------------------------------------------------------

OURS = dict.fromkeys(("model__num_layers", "model__num_heads", "model__hidden_size"))


def hf_config(corpus: Path, model_type: str, **changes: Any) -> Config:
    """A run of growth and freeze."""
    config = json.dumps({"model_type": model_type, **MODELS[model_type], **changes.pop("config", {})})
    return short_config(corpus, model__name="hf", model__config=config, **OURS, **changes)


@pytest.mark.parametrize(
    ("model_type", "engine"),
    [
        slow("gpt2", "fsdp"), ("llama", "ddp"), ("qwen3", "fsdp"),
        slow("gpt2", "zero1"), slow("gpt2", "zero3"), slow("llama", "fsdp"), slow("llama", "zero2"),
        slow("qwen3", "zero3"), slow("gpt_neox", "fsdp"), slow("mistral", "zero3"), slow("gemma", "fsdp"),
        nightly("qwen3", "zero1"), nightly("gemma", "zero3"),
    ],
)  # fmt: skip
def test_every_engine_gives_the_same_run(pool: Pool, corpus: Path, model_type: str, engine: str) -> None:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if model_type == "gpt2" else {}
    config = hf_config(corpus, model_type, parallel__engine=engine, config=dropout)
    reference = trained_once(config)
    assert [record["action"] for record in reference.of_kind("rank_event")] == ["grow", "grow", "freeze"]
    losses = reference.losses()
    assert losses[-1] < losses[0] - 0.1
    assert_same_run(pool.run("runs:train_in_worker", config, world_size=2), reference, 2)


@pytest.mark.parametrize(
    ("engine", "changes"),
    [
        ("fsdp", {}),
        slow("ddp", {"train__precision": "bf16"}),
        nightly("fsdp", {"train__precision": "bf16", "train__compile": "true"}),  # minutes of compilation
        slow("fsdp", {"train__activation_checkpointing": "true"}),
        slow("zero2", {}),
        slow("zero3", {}),
        slow("zero3", {"train__precision": "bf16"}),
    ],
)
def test_chunks_change_no_run(pool: Pool, corpus: Path, engine: str, changes: dict[str, str]) -> None:
    """The output layer is a unit of its own, which an engine gathers for one call."""
    config = hf_config(corpus, "llama", parallel__engine=engine, **changes)
    whole = pool.run("runs:train_in_worker", config, world_size=2)
    chunked = pool.run("huggingface_checks:train_in_chunks", config, world_size=2)
    tolerance = 2e-3 if changes.get("train__precision") else 1e-6
    assert chunked[0].losses() == pytest.approx(whole[0].losses(), rel=tolerance)
    assert chunked[0].losses() != whole[0].losses()
    if tolerance == 1e-6:
        assert [run.table for run in chunked] == [run.table for run in whole]


@pytest.mark.parametrize(("engine", "world_size"), [("local", 1), ("fsdp", 2), slow("zero3", 2)])
def test_a_llama_of_transformers_trains_as_ours(pool: Pool, corpus: Path, engine: str, world_size: int) -> None:
    """Growth and freeze, from the same values and with the same new modes."""
    ours = short_config(corpus, model__name="llama", model__intermediate_size=48)
    expected = trained_once(ours)
    assert [record["action"] for record in expected.of_kind("rank_event")] == ["grow", "grow", "freeze"]
    config = hf_config(corpus, "llama", parallel__engine=engine, config={"rms_norm_eps": 1e-5})
    for run in pool.run("huggingface_checks:train_like_ours", config, ours, world_size=world_size):
        assert run.losses() == pytest.approx(expected.losses(), rel=1e-6)
        assert {ours_of(name): layer for name, layer in run.table.items()} == expected.table


@pytest.mark.parametrize("model_type", [slow("qwen3"), slow("gpt2"), slow("llama")])
def test_all_commands_know_it(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str
) -> None:
    """Trained in two parts, from a folder with a config.json; evaluated, sampled, inspected, planned, verified."""
    (tmp_path / "theirs").mkdir()
    extra = {"architectures": ["Other"], "transformers_version": "4.0", "vocab_size": 5_000, "pad_token_id": 4_999}
    content = {"model_type": model_type, **MODELS[model_type], **extra, "no_such_key": 1}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(content))
    config = hf_config(corpus, model_type, run__dir=tmp_path / "run", eval__interval=12, checkpoint__interval=6)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    words = ["train", "--config", str(file), "--model.config", str(tmp_path / "theirs"), "--checkpoint.keep", "9"]
    assert main([*words, "--dry-run"]) == 0
    count = sum(parameter.numel() for parameter in really_built(skeleton(model_type)).parameters())
    assert f"hf {model_type}: {count:,} parameters dense" in capsys.readouterr().out
    assert main(words) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (start,) = [record for record in metrics if record["kind"] == "start"]
    assert start["parameters_dense"] == count
    evaluated = [record["loss"] for record in metrics if record["kind"] == "eval"][-1]

    (tmp_path / "theirs" / "config.json").unlink()  # the run holds what it said
    branch = ["--from", str(tmp_path / "run"), "--from-step", "6", "--run.dir", str(tmp_path / "branch")]
    assert main(["train", "--config", str(tmp_path / "run" / "config.yaml"), *branch]) == 0
    assert tensor_bytes(tmp_path / "run") == tensor_bytes(tmp_path / "branch")
    run = ["--run", str(tmp_path / "branch")]
    capsys.readouterr()
    assert main(["eval", *run]) == 0
    assert f"{evaluated:.4f}" in capsys.readouterr().out
    assert main(["generate", *run, "--prompt", "the", "--tokens", "5"]) == 0
    assert main(["inspect", *run]) == 0
    assert f"of {count} dense" in capsys.readouterr().out
    for command in (["verify", *run], ["report", *run], ["plan", "--config", str(tmp_path / "run" / "config.yaml")]):
        assert main(command) == 0


def test_a_changed_model_is_no_resume(corpus: Path, tmp_path: Path, fails: Fails) -> None:
    config = hf_config(corpus, "llama", run__dir=tmp_path / "run", train__steps=9, checkpoint__interval=4)
    train_in_worker(config)
    config.model.config = {**config.model.config, "rms_norm_eps": 0.1}  # type: ignore[dict-item]
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert "was trained with model.config {" in fails("train", "--config", tmp_path / "config.yaml")


def test_plan_counts_the_published_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: {name: hf, config: {model_type: gpt2}, max_seq_len: 8}\ntrain: {steps: 200}\n")
    assert main(["plan", "--config", str(file), "--tokenizer.vocab_size", "50257"]) == 0
    assert "hf gpt2: 124.4M parameters dense, vocabulary 50257, 24 layers factored" in capsys.readouterr().out


# What is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "model.config is null; write a mapping such as {model_type: qwen3, hidden_size: 256}"),
        ({"hidden_size": 4}, "model.config is {hidden_size: 4}; write a mapping"),
        ("/nowhere", "/nowhere/config.json cannot be read (No such file or directory); write a folder"),
        ({"model_type": "qwen33"}, "model_type in model.config is 'qwen33'; did you mean 'qwen3'?"),
        ({"model_type": "llama", "hiden_size": 4}, "no key 'hiden_size' for llama; did you mean 'hidden_size'?"),
        ({"model_type": "llama", "hidden_size": "wide"}, "Field 'hidden_size' expected int, got str"),
        ({"model_type": "t5"}, "'t5', an encoder and a decoder; write that of a causal language model"),
        ({"model_type": "vit"}, "'vit', not a causal language model; write that of a causal language model"),
        ({"model_type": "bert"}, "'bert', whose tokens see later ones; write that of a causal language model such as"),
        ({"model_type": "xlnet"}, "'xlnet', whose tokens see later ones"),
        ({"model_type": "bert-generation"}, "'bert-generation', whose tokens see later ones; write that of a causal"),
        ({"model_type": "gemma3"}, "'gemma3', a model of several parts; write gemma3_text"),
        ({"model_type": "llama", "max_position_embeddings": 8}, "model.max_seq_len is 16 but max_position_embeddings"),
    ],
)
def test_a_configuration_that_is_refused(config: object, said: str) -> None:
    with pytest.raises(UserError) as raised:
        ModelSettings(name="hf", config=config, max_seq_len=16)  # type: ignore[arg-type]
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        ("llama", {"vocab_size": 300}, "vocab_size in model.config is 300 but the tokenizer has 301 tokens"),
        ("llama", {"num_attention_heads": 0}, "model.config is refused by transformers for llama: "),
        ("mixtral", {"num_local_experts": 2}, "whose experts are not linear layers but one tensor (model.layers.0."),
    ],
)
def test_a_model_that_is_refused(model_type: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        skeleton(model_type, **changes)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_sizes_that_do_not_fit_are_found_before_the_first_step(capfd: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "gptj", **SIZES, "rotary_dim": 64}
    with pytest.raises(UserError, match=r"the gptj of model.config cannot run: .*; write sizes that fit each other"):
        dense_skeleton(ModelSettings(name="hf", config=config, max_seq_len=16), VOCAB)
    assert capfd.readouterr() == ("", "")


def test_initial_values_that_cannot_be_drawn() -> None:
    config = {"model_type": "xlstm", "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2}
    values = dense_skeleton(ModelSettings(name="hf", config=config, max_seq_len=16), VOCAB).initial_values(0)
    with pytest.raises(UserError, match=r"_init_weights of xLSTMForCausalLM fails .*; write another model_type"):
        values.parameter("model.backbone.embeddings.weight")


@pytest.mark.parametrize("key", ["num_layers", "hidden_size", "dropout", "tie_embeddings"])
def test_sizes_belong_into_the_config(key: str) -> None:
    value: Any = {"dropout": 0.5, "tie_embeddings": True}.get(key, 4)
    with pytest.raises(UserError, match=rf"model.{key} is {value} but model.name is hf; leave it out and write in"):
        ModelSettings(name="hf", config={"model_type": "llama"}, max_seq_len=16, **{key: value})


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.models.auto.configuration_auto", None)
    with pytest.raises(
        UserError, match=r"transformers cannot be imported .*; write pip install -e '\.\[hf\]' in the checkout"
    ):
        settings("llama")


def test_a_tensor_that_is_an_attribute() -> None:
    model = skeleton("llama")
    model.model.model.layers[1].mlp.table = torch.empty(3, device="meta")
    with pytest.raises(UserError, match=r"model.layers.1.mlp.table is a tensor but neither parameter nor buffer"):
        huggingface._refuse_unknown_tensors(model, "llama")


def test_operations_count_the_width_of_the_heads() -> None:
    """Heads of 24 in a model of width 32, and a look-up without the head of a tied embedding is no arithmetic."""
    model = skeleton("qwen3")
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    assert flops_per_token(model, 16) == 6 * (matrices + VOCAB * 32) + 12 * 2 * 48 * 16
