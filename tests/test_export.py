"""Exported models and tokenizers, read by transformers itself."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import python_block
from runs import Fails, small_config, train
from safetensors.torch import load_file, save_file
from sharing import slow
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import inrank_dist
from inrank_dist.commands.common import load_trained
from inrank_dist.commands.export import DTYPES
from inrank_dist.commands.main import Parser, main
from inrank_dist.data import Tokenizer
from inrank_dist.data.settings import TokenizerSettings
from inrank_dist.data.tokenizer import train_tokenizer
from inrank_dist.hub.factors import DESCRIPTION, TENSORS
from inrank_dist.hub.tokenizer import fast_tokenizer
from inrank_dist.runtime.errors import UserError
from inrank_dist.train.checkpoint import list_checkpoints, step_of
from inrank_dist.train.monitors.text import amount

QWEN3 = (
    "{model_type: qwen3, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, head_dim: 8, tie_word_embeddings: true}"
)
HF_GPT2 = "{model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 2, n_positions: 16}"
OF_HF = {"model__name": "hf", "model__num_layers": None, "model__num_heads": None, "model__hidden_size": None}
GROUPED = {"model__name": "llama", "model__num_heads": 4, "model__num_kv_heads": 2}
RUNS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": GROUPED,
    "llama tied": GROUPED | {"model__tie_embeddings": "true"},
    "qwen3": OF_HF | {"model__config": QWEN3},
    "gpt2 of transformers": OF_HF | {"model__config": HF_GPT2},
    "full rank": {"lowrank__mode": "full"},
}
WARM_UP, LAST = 16, 30


@pytest.fixture(
    scope="module",
    params=["gpt2", "llama", slow("llama tied"), "qwen3", slow("gpt2 of transformers"), slow("full rank")],
)
def run_folder(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints in the warm-up, with a fading base, and after the freeze. It was resumed between them."""
    folder = tmp_path_factory.mktemp("run")
    config = small_config(corpus, run__dir=folder, checkpoint__interval=8, checkpoint__keep=9, **RUNS[request.param])
    train(config)
    for checkpoint in list_checkpoints(folder):
        if step_of(checkpoint) > WARM_UP:
            shutil.rmtree(checkpoint)
    train(config, resume=True)
    return folder


@pytest.fixture(scope="module")
def gpt2_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command, with its records."""
    folder = tmp_path_factory.mktemp("gpt2") / "run"
    config = small_config(corpus, run__dir=folder, checkpoint__interval=16, eval__interval=10)
    file = folder.with_name("config.yaml")
    file.write_text(config.to_yaml())
    assert main(["train", "--config", str(file)]) == 0
    return folder


def loaded(run: Path, step: int | None = None) -> Any:
    arguments = Parser().parse_args([])
    arguments.run, arguments.step = run, step
    return load_trained(arguments)


def export(run: Path, out: Path, *words: object) -> Path:
    assert main(["export", "--run", str(run), "--output", str(out), *(str(word) for word in words)]) == 0
    return out


def test_a_relative_run_folder(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the pages write it."""
    monkeypatch.chdir(run_folder.parent)
    absolute = export(run_folder, tmp_path / "absolute", "--format", "factors")
    relative = export(Path(run_folder.name), tmp_path / "relative", "--format", "factors")
    for name in ("model.safetensors", "inrank.json"):
        assert (absolute / name).read_bytes() == (relative / name).read_bytes()


def prompts(vocab_size: int, count: int) -> Tensor:
    return torch.randint(vocab_size, (count, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("step", [WARM_UP, LAST])
def test_logits_and_greedy_text_are_ours(run_folder: Path, tmp_path: Path, step: int) -> None:
    ours = loaded(run_folder, step)
    layout = ours.checkpoint.state.layout.values()
    assert all(layer.base == (step == WARM_UP) for layer in layout)
    out = export(run_folder, tmp_path / "out", "--step", step)
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = prompts(ours.tokenizer.vocab_size, 1000)
    torch.testing.assert_close(theirs(ids).logits, ours.model(ids), rtol=0, atol=1e-5)
    start = ids[:50, :4]
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    generated = theirs.generate(start, attention_mask=torch.ones_like(start), **greedy)
    assert generated.shape == (50, 16)
    logits = ours.model(generated)[:, 3:-1]  # two tokens may be as likely up to rounding
    chosen = logits.gather(-1, generated[:, 4:, None])[..., 0]
    torch.testing.assert_close(chosen, logits.amax(-1), rtol=0, atol=2e-5)


def test_the_folder_is_what_transformers_writes(gpt2_run: Path, tmp_path: Path) -> None:
    """Saved again by transformers, the weights have the same names and values; the text comes with the pipeline."""
    out = export(gpt2_run, tmp_path / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    config, again = (json.loads((folder / "config.json").read_text()) for folder in (out, tmp_path / "again"))
    assert config == again and config["architectures"] == ["GPT2LMHeadModel"]
    (answer,) = pipeline("text-generation", model=model, tokenizer=tokenizer)("def ", max_new_tokens=4, do_sample=False)
    assert answer["generated_text"].startswith("def ")
    eos = loaded(gpt2_run).tokenizer.eos_id
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == generation["bos_token_id"] == tokenizer.eos_token_id == eos
    assert tokenizer.model_max_length == 16


def test_older_versions_of_transformers_understand_the_folder(corpus: Path, tmp_path: Path) -> None:
    """They do not know rope_parameters and TokenizersBackend. The version at hand reads both names."""
    changes = {"model__name": "llama", "model__rope_theta": 500.0, "train__steps": 2, "checkpoint__interval": 2}
    train(small_config(corpus, run__dir=tmp_path / "run", lowrank__mode="full", **changes))
    out = export(tmp_path / "run", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["rope_theta"] == 500.0
    tokenizer_class = json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert tokenizer_class == "PreTrainedTokenizerFast"
    ours, ids = loaded(tmp_path / "run"), prompts(301, 20)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out).eval()(ids).logits
        torch.testing.assert_close(found, ours.model(ids), rtol=0, atol=1e-5)


def test_each_weight_is_rounded_once(gpt2_run: Path, tmp_path: Path) -> None:
    ours = loaded(gpt2_run)
    exact = ours.model.get_submodule("blocks.1.mlp.up").weight(torch.float64)
    for name, dtype in DTYPES.items():
        out = export(gpt2_run, tmp_path / name, "--dtype", name)
        theirs = load_file(out / "model.safetensors")
        assert {tensor.dtype for tensor in theirs.values()} == {dtype}
        assert torch.equal(theirs["transformer.h.1.mlp.c_fc.weight"], exact.T.to(dtype))
        assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == dtype


def test_large_models_are_split_into_several_files(gpt2_run: Path, tmp_path: Path) -> None:
    whole = export(gpt2_run, tmp_path / "whole")
    split = export(gpt2_run, tmp_path / "split", "--max-shard-size", "50KB")
    files = sorted(split.glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 52_000 for file in files)
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    parts = [load_file(file) for file in files]
    expected = load_file(whole / "model.safetensors")
    assert sum(len(part) for part in parts) == len(expected)
    model = AutoModelForCausalLM.from_pretrained(split)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.items())


def test_the_card_has_the_numbers_of_the_run(gpt2_run: Path, tmp_path: Path) -> None:
    card = (export(gpt2_run, tmp_path / "out") / "README.md").read_text()
    state = loaded(gpt2_run).checkpoint.state
    records = [json.loads(line) for line in (gpt2_run / "metrics.jsonl").read_text().splitlines()]
    assert f"| validation loss | {records[-1]['validation_loss']:.4f} nats per token |" in card
    for name, layer in state.layout.items():
        assert re.search(rf"\| {re.escape(name)} \| \d+ x \d+ \| {layer.rank} \| \d+ \| \d+ \|", card)
    dense = sum(parameter.numel() for parameter in loaded(gpt2_run).skeleton.parameters())
    assert f"| parameters of this model | {dense:,} (dense weights; the factors are merged) |" in card
    assert f"The trained model had {amount(records[-1]['parameters'])} parameters" in card
    assert f"| tokens | {state.tokens:,} |" in card


MEASURE = """
import sys
from pathlib import Path
from inrank_dist.commands.main import main
from inrank_dist.train.memory import peak_resident_bytes
run, warm_up, out = sys.argv[1:]
words = ["export", "--run", run, "--output"]
main([*words, warm_up])  # what libraries allocate on first use
Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
before = peak_resident_bytes()
assert main([*words, out]) == 0
print(peak_resident_bytes() - before)
"""


@pytest.mark.slow
def test_memory_holds_two_layers_and_not_the_model(corpus: Path, tmp_path: Path) -> None:
    """The dense model has 227 MB, its largest layer 9 MB in float32 and 19 MB in float64."""
    shape = {"model__hidden_size": 768, "model__num_layers": 8, "model__num_heads": 4}
    fixed = {"lowrank__mode": "fixed", "lowrank__base": "none", "lowrank__initial_rank": 2, "train__steps": 1}
    train(small_config(corpus, run__dir=tmp_path / "run", checkpoint__interval=1, **shape, **fixed))
    words = [sys.executable, "-c", MEASURE, tmp_path / "run", tmp_path / "first", tmp_path / "out"]
    given_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # what is freed, so that the peak is true
    done = subprocess.run([str(word) for word in words], env=given_back, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 220e6
    assert int(done.stdout.split()[-1]) < 3 * 19e6


# Factors ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("step", [WARM_UP, LAST])
def test_factors_are_loaded_as_they_were(run_folder: Path, tmp_path: Path, step: int) -> None:
    ours = loaded(run_folder, step)
    model = inrank_dist.load(export(run_folder, tmp_path / "out", "--format", "factors", "--step", step))
    stored = dict(ours.model.named_parameters())
    assert all(torch.equal(parameter, stored[name]) for name, parameter in model.named_parameters())
    ids = prompts(ours.tokenizer.vocab_size, 50)
    assert torch.equal(model(ids), ours.model(ids))
    assert Tokenizer.load(tmp_path / "out" / "tokenizer.model").fingerprint == ours.tokenizer.fingerprint


@torch.no_grad()
@pytest.mark.parametrize("cut", [("--rank", 2), ("--energy", 0.9)])
def test_a_cut_is_the_best_approximation(
    gpt2_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: tuple[str, float]
) -> None:
    ours = loaded(gpt2_run)
    model = inrank_dist.load(export(gpt2_run, tmp_path / "factors", "--format", "factors", *cut))
    said = capsys.readouterr().out
    size = sum(parameter.numel() for parameter in model.parameters())
    assert f"| parameters of this model | {size:,} |" in (tmp_path / "factors" / "README.md").read_text()
    dense = load_file(export(gpt2_run, tmp_path / "dense", *cut) / "model.safetensors")
    discarded = total = 0.0
    for name in ours.checkpoint.state.layout:
        U, sigma, Vh = torch.linalg.svd(ours.model.get_submodule(name).weight(torch.float64))
        energy = sigma.square().cumsum(0) / sigma.square().sum()
        rank = 2 if cut[0] == "--rank" else int((energy < 0.9).sum()) + 1
        expected = (U[:, :rank] * sigma[:rank]) @ Vh[:rank]
        layer = model.get_submodule(name)
        assert layer.modes == rank
        torch.testing.assert_close(layer.weight(torch.float64), expected, rtol=0, atol=1e-6)
        discarded, total = discarded + float(sigma[rank:].square().sum()), total + float(sigma.square().sum())
    up = model.get_submodule("blocks.1.mlp.up").weight(torch.float64)
    torch.testing.assert_close(dense["transformer.h.1.mlp.c_fc.weight"].T.double(), up, rtol=0, atol=1e-6)
    assert f"discards {discarded / total:.4%} of the energy" in said


@pytest.mark.parametrize("step", [WARM_UP, LAST])
def test_the_lines_of_the_page_read_the_factors(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    ours = loaded(run_folder, step)
    export(run_folder, tmp_path / "my-factors", "--format", "factors", "--step", step)
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    exec(python_block("my-factors/inrank.json"), variables)
    dense = inrank_dist.merge(ours.model, ours.skeleton)
    assert all(torch.equal(variables["state"][name], parameter) for name, parameter in dense.named_parameters())


def test_factors_load_in_another_dtype(gpt2_run: Path, tmp_path: Path) -> None:
    model = inrank_dist.load(export(gpt2_run, tmp_path / "out", "--format", "factors", "--dtype", "bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / DESCRIPTION).unlink(), "inrank.json cannot be read"),
        (lambda folder: (folder / DESCRIPTION).write_text("{"), "inrank.json is not JSON"),
        (lambda folder: (folder / DESCRIPTION).write_text("[" * 100_000), "inrank.json is not JSON"),
        (lambda folder: (folder / DESCRIPTION).write_text("[]"), "inrank.json is damaged (KeyError: 'format')"),
        (lambda folder: os.truncate(folder / DESCRIPTION, 1 << 40), "inrank.json is larger than 64 MiB"),
        (lambda folder: edit(folder, lambda d: d.update(format=2)), "damaged (ValueError: format 2)"),
        (lambda folder: edit(folder, lambda d: d["model"].update(num_layers=-1)), "model.num_layers is -1"),
        (lambda folder: edit(folder, lambda d: d["model"].update(evil=1)), "damaged (TypeError"),
        (lambda folder: edit(folder, lambda d: d.update(vocab_size=400)), "model.safetensors holds"),
        (
            lambda folder: edit(folder, lambda d: d["layers"]["blocks.0.mlp.up"].update(modes=33)),
            "that its model cannot",
        ),
        (
            lambda folder: edit(folder, lambda d: d["layers"].update(evil=d["layers"]["blocks.0.mlp.up"])),
            "rank of evil",
        ),
        (lambda folder: (folder / TENSORS).unlink(), "model.safetensors cannot be read"),
        (lambda folder: os.truncate(folder / TENSORS, 1000), "model.safetensors is damaged"),
        (lambda folder: torch.save({}, folder / TENSORS), "model.safetensors is damaged"),
        (lambda folder: save_file({"a": torch.zeros(2)}, folder / TENSORS), "model.safetensors holds a as [2], where"),
    ],
)
def test_a_damaged_folder(gpt2_run: Path, tmp_path: Path, damage: Any, said: str) -> None:
    out = export(gpt2_run, tmp_path / "out", "--format", "factors")
    damage(out)
    with pytest.raises(UserError) as raised:
        inrank_dist.load(out)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def edit(folder: Path, change: Any) -> None:
    description = json.loads((folder / DESCRIPTION).read_text())
    change(description)
    (folder / DESCRIPTION).write_text(json.dumps(description))


# Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rank", 0], "--rank is 0; write a whole number of at least 1"),
        (["--energy", 1.5], "--energy is 1.5; write a share above 0 and at most 1, such as 0.99"),
        (["--rank", 2, "--energy", 0.5], "--rank and --energy are both given; write one of them"),
        (["--max-shard-size", "big"], "--max-shard-size is big; write a size such as 500MB or 5GB"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--step", 7], "holds no checkpoint of step 7; write one of"),
    ],
)
def test_mistakes(gpt2_run: Path, tmp_path: Path, fails: Fails, words: list[object], said: str) -> None:
    assert said in fails("export", "--run", gpt2_run, "--output", tmp_path / "out", *words)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_not_touched(gpt2_run: Path, tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "which exists; write a new folder" in fails("export", "--run", gpt2_run, "--output", tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_models_that_transformers_does_not_have(corpus: Path, tmp_path: Path, fails: Fails) -> None:
    bottleneck = {"lowrank__mode": "fixed", "lowrank__base": "none", "lowrank__activation": "silu"}
    train(small_config(corpus, run__dir=tmp_path / "run", checkpoint__interval=30, **bottleneck))
    said = fails("export", "--run", tmp_path / "run", "--output", tmp_path / "out")
    assert said == "lowrank.activation is silu, so the factors cannot be merged; write --format factors"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    ours = loaded(tmp_path / "run")
    model = inrank_dist.load(export(tmp_path / "run", tmp_path / "out", "--format", "factors"))
    ids = prompts(ours.tokenizer.vocab_size, 10)
    assert torch.equal(model(ids), ours.model(ids))


# Tokenizers ------------------------------------------------------------------------------------------------------


def library_texts() -> list[str]:
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:12]
    return [file.read_text(encoding="utf-8", errors="ignore") for file in files]


def strings(count: int) -> list[str]:
    """Random Unicode, marks and special tokens as text, and pieces of real text."""
    rng, texts = random.Random(0), library_texts()
    marks = [
        "<0x41>",
        "<|endoftext|>",
        "<unk>",
        " ",
        "  ",
        "\u2581",
        "\u2585",
        "a",
        "<0x",
        "41>",
        "the",
        "\x00",
        "\r\n",
    ]

    def one() -> str:
        choice, length = rng.random(), rng.randrange(200)
        if choice < 0.3:
            ranges = [(32, 127), (0, 0x300), (0x4E00, 0x9FFF), (0x1F300, 0x1F700), (0x2580, 0x2586)]
            return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(length))
        if choice < 0.45:
            return "".join(rng.choice(marks) for _ in range(length))
        if choice < 0.6:
            codes = (rng.randrange(0x110000) for _ in range(length))
            return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        text = rng.choice(texts)
        start = rng.randrange(max(len(text) - length, 1))
        return text[start : start + length]

    return [one() for _ in range(count)]


@pytest.mark.parametrize(("kind", "ties"), [("bpe", 0), ("unigram", 20)])
def test_ids_and_text_are_those_of_sentencepiece(kind: Any, ties: int) -> None:
    """A unigram model may resolve a tie between segmentations in another way, which is rare."""
    tokenizer = train_tokenizer(library_texts(), TokenizerSettings(kind=kind, vocab_size=1000))
    fast = fast_tokenizer(tokenizer.model)
    different = 0
    for text in strings(2000):
        ids = fast.encode(text).ids
        assert fast.decode(ids, skip_special_tokens=False) == text
        different += ids != tokenizer.encode(text)
    assert different <= ties


def test_the_saved_tokenizer_treats_special_tokens_as_text(gpt2_run: Path, tmp_path: Path) -> None:
    ours, theirs = loaded(gpt2_run).tokenizer, AutoTokenizer.from_pretrained(export(gpt2_run, tmp_path / "out"))
    for text in strings(300):
        ids = theirs(text).input_ids
        assert ids == ours.encode(text) and theirs.decode(ids) == text
    assert theirs.eos_token_id not in theirs("<|endoftext|>").input_ids
    assert theirs("<|endoftext|>", split_special_tokens=False).input_ids == [ours.eos_id]
