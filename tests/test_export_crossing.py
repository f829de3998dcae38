"""Exported models with layer crossing, whose code transformers takes from the folder."""

import ast
import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import python_block
from runs import Fails, small_config, train
from safetensors.torch import load_file
from sharing import slow
from test_export import GROUPED, LAST, WARM_UP, export, loaded, prompts
from test_init_from import logits_at_the_start
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    dynamic_module_utils,
)

import inrank_dist
from inrank_dist.runtime.errors import UserError

CROSSING = {"model__layer_crossing": "true", "model__num_layers": 3}
RUNS: dict[str, dict[str, Any]] = {
    "gpt2": CROSSING,
    "llama": CROSSING | GROUPED,
    "llama tied": CROSSING | GROUPED | {"model__tie_embeddings": "true"},
}
CODE = "modeling_layer_crossing.py"
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Exported:
    """A run and its exports of both steps, with the base and after the freeze."""

    def __init__(self, folder: Path, corpus: Path, kind: str) -> None:
        self.kind, self.changes, self.run = kind, RUNS[kind], folder / "run"
        train(small_config(corpus, run__dir=self.run, checkpoint__interval=8, checkpoint__keep=9, **self.changes))
        self.folders = {step: export(self.run, folder / f"step-{step}", "--step", step) for step in (WARM_UP, LAST)}

    @property
    def folder(self) -> Path:
        return self.folders[LAST]


@pytest.fixture(scope="module", params=["gpt2", slow("llama"), slow("llama tied")])
def exported(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("crossing"), corpus, request.param)


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The code is copied below the home otherwise, where the tests of another process copy theirs."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def trusted(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@torch.no_grad()
@pytest.mark.parametrize("step", [WARM_UP, LAST])
def test_logits_and_greedy_text_are_ours(exported: Exported, step: int) -> None:
    ours, theirs = loaded(exported.run, step), trusted(exported.folders[step])
    ids = prompts(ours.tokenizer.vocab_size, 1000)
    expected = ours.model(ids)
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-5)
    start = ids[:50, :4]
    for use_cache in (True, False):
        mask = torch.ones_like(start)
        found = theirs.generate(start, attention_mask=mask, max_new_tokens=12, use_cache=use_cache, **GREEDY)
        assert found.shape == (50, 16)
        logits = ours.model(found)[:, 3:-1]  # two tokens may be as likely up to rounding
        chosen = logits.gather(-1, found[:, 4:, None])[..., 0]
        torch.testing.assert_close(chosen, logits.amax(-1), rtol=0, atol=2e-5)
    plain = GPT2LMHeadModel if exported.kind == "gpt2" else LlamaForCausalLM
    uncrossed = plain.from_pretrained(exported.folders[step]).eval()
    assert not torch.allclose(uncrossed(ids).logits, expected, atol=1e-2)


@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_whole_text(exported: Exported) -> None:
    model = trusted(exported.folder)
    ids = prompts(301, 5)
    whole, cache, parts = model(ids).logits, None, []
    for part in ids.split([7, 1, 5, 3], 1):
        given = {} if cache is None else {"past_key_values": cache}
        output = model(part, use_cache=True, **given)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_padded_prompts_are_continued_as_alone(exported: Exported) -> None:
    model = trusted(exported.folder)
    ids = prompts(301, 3)
    lengths = [3, 8, 5]
    mask = torch.tensor([[0] * (8 - length) + [1] * length for length in lengths])
    padded = torch.stack([ids[row, :8].roll(8 - length) for row, length in enumerate(lengths)]) * mask
    found = model.generate(padded, attention_mask=mask, max_new_tokens=6, **GREEDY)
    for row, length in enumerate(lengths):
        prompt = ids[row : row + 1, :length]
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, **GREEDY)
        assert found[row, 8:].tolist() == alone[0, length:].tolist()


def test_gradients_are_ours(exported: Exported) -> None:
    ours, theirs = loaded(exported.run), trusted(exported.folder)
    dense = inrank_dist.merge(ours.model, ours.skeleton)
    ids = prompts(ours.tokenizer.vocab_size, 8)
    theirs(ids, labels=ids).loss.backward()
    (dense(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()).backward()
    names = [
        ("transformer.h.1.mlp.c_fc.weight", "blocks.1.mlp.up.weight"),
        ("model.layers.1.mlp.up_proj.weight", "blocks.1.mlp.up.weight"),
        ("transformer.wte.weight", "tok_embed.weight"),
        ("model.embed_tokens.weight", "tok_embed.weight"),
    ]
    found, expected = dict(theirs.named_parameters()), dict(dense.named_parameters())
    pairs = [(found[a].grad, expected[b].grad) for a, b in names if a in found]
    assert len(pairs) == 2
    for gradient, reference in pairs:
        gradient = gradient if gradient.shape == reference.shape else gradient.T
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


def test_it_is_saved_and_loaded_again(exported: Exported, tmp_path: Path) -> None:
    model = trusted(exported.folder)
    again = tmp_path / "again"
    model.save_pretrained(again)
    config, second = (json.loads((folder / "config.json").read_text()) for folder in (exported.folder, again))
    config.pop("rope_theta", None)  # for older versions
    assert config == second and config["architectures"] == [type(model).__name__]
    assert (again / CODE).read_bytes() == (exported.folder / CODE).read_bytes()
    tensors = [load_file(folder / "model.safetensors") for folder in (exported.folder, again)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    ids = prompts(301, 5)
    with torch.no_grad():
        assert torch.equal(trusted(again)(ids).logits, model(ids).logits)


def test_the_lines_of_the_page_generate_text(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my-model").symlink_to(exported.folder)
    monkeypatch.chdir(tmp_path)
    exec(python_block("pipeline(").replace("max_new_tokens=64", "max_new_tokens=8"), {})
    assert capsys.readouterr().out.startswith("def ")


def test_the_base_model_crosses_too(exported: Exported) -> None:
    base, model = AutoModel.from_pretrained(exported.folder, trust_remote_code=True), trusted(exported.folder)
    ids = AutoTokenizer.from_pretrained(exported.folder)("def f", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model.lm_head(base.eval()(ids).last_hidden_state), model(ids).logits)


def test_without_trust_nothing_is_loaded(exported: Exported) -> None:
    """Rather than the model without crossing, which has the same parameters."""
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(exported.folder, trust_remote_code=False)


@torch.no_grad()
def test_threads_share_a_model(exported: Exported) -> None:
    model = trusted(exported.folder)
    batches = prompts(301, 64).split(4)
    expected = [model(batch).logits for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: model(batch).logits, [*batches] * 4))
    for logits, reference in zip(found, expected * 4, strict=True):
        torch.testing.assert_close(logits, reference, rtol=0, atol=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.slow
@torch.no_grad()
def test_compiled_it_computes_the_same(exported: Exported) -> None:
    model = trusted(exported.folder)
    compiled = torch.compile(model, backend="eager")
    for length in (16, 9, 12):
        ids = prompts(301, 4)[:, :length]
        assert torch.equal(compiled(ids).logits, model(ids).logits)


def test_checkpointed_activations_are_refused(exported: Exported) -> None:
    """The recomputation would leave the crossing out."""
    with pytest.raises(ValueError, match=r"does not support (gradient|activation) checkpointing"):
        trusted(exported.folder).gradient_checkpointing_enable()


def test_the_code_stands_alone(exported: Exported) -> None:
    imported = set()
    for node in ast.walk(ast.parse((exported.folder / CODE).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_the_card_and_the_command_say_what_it_needs(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = export(exported.run, tmp_path / "out")
    said = capsys.readouterr().out
    assert f"from_pretrained({str(out)!r}, trust_remote_code=True)" in said and str(out / CODE) in said
    card = (out / "README.md").read_text()
    assert f"its code is `{CODE}`" in card and "`trust_remote_code=True`" in card and "custom_code" in card
    factors = export(exported.run, tmp_path / "factors", "--format", "factors")
    assert "trust_remote_code" not in capsys.readouterr().out + (factors / "README.md").read_text()
    ours, ids = loaded(exported.run), prompts(301, 5)
    with torch.no_grad():
        assert torch.equal(inrank_dist.load(factors)(ids), ours.model(ids))


# Back again ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(exported: Exported, tmp_path: Path) -> Path:
    """The folder with code that must not be executed."""
    folder = tmp_path / "hostile"
    shutil.copytree(exported.folder, folder)
    (folder / CODE).write_text(f"from pathlib import Path\nPath({str(tmp_path / 'executed')!r}).touch()\n")
    return folder


def logits_from(folder: Path, exported: Exported, corpus: Path, run: Path, ids: Tensor, **changes: Any) -> Tensor:
    settings = {"lowrank__mode": "full", "model__init_from": folder, "tokenizer__path": tokenizer(exported)}
    config = small_config(corpus, run__dir=run, **exported.changes | settings | changes)
    return logits_at_the_start(config, ids)[0]


def tokenizer(exported: Exported) -> Path:
    return loaded(exported.run).checkpoint.tokenizer_file


def test_a_run_starts_from_it_and_executes_nothing(
    exported: Exported, hostile: Path, corpus: Path, tmp_path: Path
) -> None:
    ids = prompts(301, 50)
    found = logits_from(hostile, exported, corpus, tmp_path / "run", ids)
    with torch.no_grad():
        torch.testing.assert_close(found, loaded(exported.run).model(ids), rtol=0, atol=2e-6)
    assert not (tmp_path / "executed").exists()


def test_other_settings_are_refused(
    exported: Exported, hostile: Path, corpus: Path, tmp_path: Path, fails: Fails
) -> None:
    name = exported.changes.get("model__name", "gpt2")
    with pytest.raises(UserError, match=rf"holds a {name}_layer_crossing, .* a {name}; .* model.layer_crossing: true"):
        logits_from(hostile, exported, corpus, tmp_path / "run", prompts(301, 1), model__layer_crossing="false")
    plain = json.loads((hostile / "config.json").read_text()) | {"model_type": name}
    (hostile / "config.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match=rf"holds a {name}, .* a {name}_layer_crossing; write model.layer_crossing: f"):
        logits_from(hostile, exported, corpus, tmp_path / "run", prompts(301, 1))
    with pytest.raises(UserError, match=r"inrank.json cannot be read \(.*\); write a folder that inrank export"):
        inrank_dist.load(exported.folder)
    with pytest.raises(UserError, match=rf"write model.name: {name} and model.layer_crossing: true"):
        small_config(corpus, model__name="hf", model__config=exported.folder, **HF_ALONE)
    assert not (tmp_path / "executed").exists()


HF_ALONE = {"model__num_layers": None, "model__num_heads": None, "model__hidden_size": None}
