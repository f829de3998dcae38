"""Settings: every file in configs/ works, and what is written is what is meant."""

import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sharing import slow

from inrank_dist.commands.main import main
from inrank_dist.config import SECTIONS, SETTINGS, Config, load_config
from inrank_dist.lowrank.convert import LayerLayout, convert
from inrank_dist.method.initial import layer_shapes
from inrank_dist.method.settings import LowRankSettings
from inrank_dist.models import flops_per_token
from inrank_dist.runtime.errors import UserError
from inrank_dist.train.building import dense_skeleton

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
PUBLISHED = {
    "small": ("124.4M", 6e-4, "bf16"),
    "medium": ("354.8M", 1.5e-4, "fp32"),
    "large": ("774.0M", 1.5e-4, "fp32"),
}
RECOMMENDED = {f"gpt2-{size}": count for size, (count, _, _) in PUBLISHED.items()}
RECOMMENDED |= {"llama-130m": "134.1M", "llama-350m": "368.0M", "llama-1b": "1.34B"}
DRY_RUN = [
    path if path.stem in ("quickstart", "gpt2-small-inrank") else slow(path)
    for path in CONFIGS
    if path.stem != "deep-lora"  # needs the quickstart's run: see test_deep.py
]
MODEL = [f"--model.{key}={value}" for key, value in (("num_layers", 1), ("num_heads", 2), ("hidden_size", 16))]
MODEL += ["--model.max_seq_len=8", "--lowrank.initial_rank=2"]


def file_named(name: str) -> Path:
    return next(path for path in CONFIGS if path.stem == name)


def config_named(name: str) -> Config:
    return load_config(file_named(name))[0]


def made(*overrides: str) -> Config:
    return load_config(None, [*MODEL, *overrides])[0]


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        made(*overrides)
    return str(caught.value)


def refused_file(folder: Path, text: str) -> str:
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(folder / "config.yaml")
    return str(caught.value)


def test_every_size_is_there_with_its_controls() -> None:
    names = {path.stem for path in CONFIGS}
    published = {f"gpt2-{size}-published{mode}" for size in PUBLISHED for mode in ("", "-dense")}
    recommended = {f"{size}-{mode}" for size in RECOMMENDED for mode in ("inrank", "dense", "dense-flops")}
    neighbours = {f"quickstart-{name}" for name in ("pretrain", "spectral", "cuttlefish")}
    assert names == published | recommended | neighbours | {"quickstart", "deep-lora"}


@pytest.mark.parametrize("path", DRY_RUN, ids=lambda path: path.stem)
def test_every_config_dry_runs(
    path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the published number of parameters, no setting without effect, and nothing written."""
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert main(["train", "--config", str(path), "--dry-run"]) == 0
    cautions = load_config(path)[0].cautions()
    assert [record.getMessage() for record in caplog.records] == [f"warning: {each}" for each in cautions]
    assert not list(tmp_path.iterdir())
    if not path.stem.startswith("quickstart"):
        size = "-".join(path.stem.split("-")[:2])
        assert f"{RECOMMENDED[size]} parameters" in capsys.readouterr().out


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_recipe(size: str) -> None:
    """The recipe of arXiv 2306.11250; full rank and InRank-Efficient differ in the low-rank section alone."""
    full, efficient = (config_named(f"gpt2-{size}-published{mode}") for mode in ("-dense", ""))
    _, lr, precision = PUBLISHED[size]
    assert full.train.global_batch_size * full.model.max_seq_len == 524_288
    assert (full.train.steps, full.schedule.name, full.schedule.warmup_steps) == (22_500, "linear", 225)
    assert (full.optimizer.lr, full.optimizer.weight_decay, full.train.grad_clip) == (lr, 0.1, 1.0)
    assert (full.train.precision, full.model.dropout, full.tokenizer.vocab_size) == (precision, 0.1, 50257)
    assert (full.data.config, full.data.validation_split) == ("wikitext-103-raw-v1", "validation")
    low = efficient.lowrank
    assert (low.mode, low.targets, low.initial_rank, low.buffer, low.threshold) == ("efficient", ["mlp"], 2, 100, 0.9)
    assert (low.base, low.init, low.measure, low.criterion) == ("none", "kaiming", "product", "variance")
    full.lowrank, full.run = efficient.lowrank, efficient.run
    assert efficient == full


@pytest.mark.parametrize("size", RECOMMENDED)
def test_the_twins_of_a_recommended_config(size: str) -> None:
    """Equal in all but what is compared; at equal operations the dense one has fewer steps."""
    ours, tokens, flops = (config_named(f"{size}-{mode}") for mode in ("inrank", "dense", "dense-flops"))
    assert len({config.run.folder for config in (ours, tokens, flops)}) == 3
    assert (ours.optimizer.name, tokens.optimizer.name, tokens.lowrank.mode) == ("lora_muon", "muon", "full")
    assert 4.5 <= (ours.data.max_bytes or 0) / (ours.train.steps * 2**19) <= 5  # bytes of English a token
    skeleton = dense_skeleton(ours.model, ours.tokenizer.vocab_size)
    assert 19 <= ours.train.steps * 2**19 / sum(p.numel() for p in skeleton.parameters()) <= 21  # tokens a parameter
    rank, dense_steps = ours.lowrank.initial_rank, ours.lowrank.dense_steps(ours.train.steps)
    layout = {name: LayerLayout(rank, rank, base=False) for name in layer_shapes(skeleton, ours.lowrank)}
    low_rank = convert(skeleton, layout)
    parameters = [sum(p.numel() for p in model.blocks.parameters()) for model in (low_rank, skeleton)]
    assert 0.44 < parameters[0] / parameters[1] < 0.55
    each = [flops_per_token(model, ours.model.max_seq_len) for model in (low_rank, skeleton)]
    used = (ours.train.steps - dense_steps) * each[0] + dense_steps * each[1]
    assert flops.train.steps * each[1] == pytest.approx(used, rel=0.01)
    flops.train.steps, flops.run = tokens.train.steps, tokens.run
    assert flops == tokens
    tokens.lowrank, tokens.run, tokens.optimizer.name = ours.lowrank, ours.run, ours.optimizer.name
    assert tokens == ours


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_printed_config_is_the_same_config(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A resumed run and ``eval`` read what ``train`` wrote."""
    overrides = ["--optimizer.eps", "1e-9", "--data.paths", "[a b/*.txt, '#x']", "--run.dir", "null", "--run.seed=7"]
    assert main(["train", "--config", str(path), "--print-config", *overrides]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_config(printed) == (load_config(path, overrides)[0], set(SETTINGS))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@settings(max_examples=60, deadline=None)
@given(name=TEXT, paths=st.lists(TEXT, min_size=1), lr=st.floats(1e-300, 1e300))
def test_any_value_survives_writing_and_reading(
    tmp_path_factory: pytest.TempPathFactory, name: str, paths: list[str], lr: float
) -> None:
    """Texts such as ``null``, ``007`` or ``1e-3`` stay texts; numbers keep their last bit."""
    config = made("--data.source=files", "--data.paths=[a]")
    config.run.name, config.data.paths, config.optimizer.lr = name, paths, lr
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(file)[0] == config


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--train.steps", "300"], "train.steps", 300),
        (["--train.steps=300"], "train.steps", 300),
        (["--train.steps=300", "--train.steps", "301"], "train.steps", 301),
        (["--optimizer.lr", "1e-3"], "optimizer.lr", 1e-3),
        (["--optimizer.lr=1E-3"], "optimizer.lr", 1e-3),
        (["--optimizer.lr=1"], "optimizer.lr", 1.0),
        (["--model.norm_eps", "1.e-6"], "model.norm_eps", 1e-6),
        (["--lowrank.targets", "[attention,mlp]"], "lowrank.targets", ["attention", "mlp"]),
        (["--lowrank.targets=[attention, mlp]"], "lowrank.targets", ["attention", "mlp"]),
        (["--data.paths", "[1,true,null]"], "data.paths", ["1", "true", "null"]),
        (["--train.compile", "true"], "train.compile", True),
        (["--lowrank.base", "none"], "lowrank.base", "none"),
        (["--run.dir", "null"], "run.dir", None),
        (["--run.dir", "1e3"], "run.dir", "1e3"),
        (["--run.dir", "~/a=b"], "run.dir", "~/a=b"),
        (["--run.name", "007"], "run.name", "007"),
        (["--run.name=null"], "run.name", "null"),
        (["--lowrank.freeze_step", "200"], "lowrank.freeze_step", 200),
        (["--model.tie_embeddings", "false"], "model.tie_embeddings", False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_overrides(words: list[str], key: str, value: object) -> None:
    section, _, name = key.partition(".")
    config, given_keys = load_config(None, [*MODEL, *words])
    found = getattr(getattr(config, section), name)
    assert (found, type(found)) == (value, type(value))
    assert key in given_keys


def test_overrides_beat_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("optimizer: {lr: 1e-3, beta1: 0.8}\n")
    config, given_keys = load_config(file, [*MODEL, "--optimizer.lr=2e-3"])
    assert (config.optimizer.lr, config.optimizer.beta1) == (2e-3, 0.8)
    assert {"optimizer.lr", "optimizer.beta1"} <= given_keys
    assert "optimizer.beta2" not in given_keys


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("train.stepz", "train.steps"),
        ("trian.steps", "train.steps"),
        ("steps", "train.steps"),
        ("train.lr", "optimizer.lr"),
        ("model.n_layers", "model.num_layers"),
        ("lowrnk.treshold", "lowrank.threshold"),
        ("lowrank.targets+", "lowrank.targets"),
        ("train", "train.steps"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(written: str, meant: str) -> None:
    assert refused(f"--{written}", "3") == f"unknown setting '{written}'; did you mean '{meant}'?"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lowrnk: {mode: full}", "unknown section lowrnk; did you mean 'lowrank'?"),
        ("lowrank: {treshold: 0.9}", "unknown setting 'lowrank.treshold'; did you mean 'lowrank.threshold'?"),
        ("train:", "section train is empty; write keys below it, or remove it"),
        ("train: {}", "section train is empty; write keys below it, or remove it"),
        ("train: 100", "section train holds 100; write keys below it, one a line"),
        ("train: [steps]", "section train holds [steps]; write keys below it, one a line"),
        ("1: {steps: 2}", "unknown section 1; known are run, model"),
        ("train: {1: 2}", "unknown setting 'train.1'"),
        ("train: {yes: 2}", "unknown setting 'train.true'"),
        ("train: {steps: 2, steps: 3}", "is not valid YAML in line 1, column 19: 'steps' is written twice"),
        ("log: {interval: 1}\nlog: {interval: 2}", "is not valid YAML in line 2, column 1: 'log' is written twice"),
        ("train: {[a]: 2}", "is not valid YAML in line 1, column 9: found unhashable key"),
        ("train: [", "is not valid YAML in line 2, column 1: expected the node content"),
        ("train:\n\tsteps: 2", "is not valid YAML in line 2, column 1: found character '\\t'"),
        ("train: {steps: 2}\n---\nlog: {interval: 2}", "is not valid YAML in line 2, column 1"),
        ("run: {name: !!python/name:os.system x}", "is not valid YAML in line 1"),
        ("run: {name: 2020-13-01}", "is not valid YAML: month must be in 1..12"),
        ("", "holds no settings; write sections such as 'model:'"),
        ("# nothing yet", "holds no settings"),
        ("- train", "holds no settings"),
        ("just text", "holds no settings"),
        ("train: {steps: 2}", "model.num_layers, model.num_heads, model.hidden_size, model.max_seq_len are missing"),
        ("model: {num_layers: 1, num_heads: 2, hidden_size: 8}", "model.max_seq_len is missing; write a whole number"),
        ("run: {name: 007}", "run.name is 7; write text, in quotes"),
        ("run: {name: no}", "run.name is false; write text, in quotes"),
        ("run: {name: [a]}", "run.name is [a]; write text"),
        ("run: {name: {a: b}}", "run.name is {a: b}; write text"),
        ("run: {name: null}", "run.name is null; write text"),
        ("run: {dir: 1}", "run.dir is 1; write text or null"),
        ("train: {steps: null}", "train.steps is null; write a whole number"),
        ("train: {steps:}", "train.steps is null; write a whole number"),
        ("train: {steps: '100'}", "train.steps is '100'; write a whole number"),
        ("train: {steps: 100.0}", "train.steps is 100.0; write a whole number"),
        ("train: {steps: true}", "train.steps is true; write a whole number"),
        ("train: {compile: 1}", "train.compile is 1; write true or false"),
        ("optimizer: {lr: true}", "optimizer.lr is true; write a number"),
        ("optimizer: {lr: .nan}", "optimizer.lr is .nan; write a number"),
        ("optimizer: {lr: .inf}", "optimizer.lr is .inf; write a number"),
        ("optimizer: {lr: fast}", "optimizer.lr is fast; write a number"),
        ("lowrank: {targets: mlp}", "lowrank.targets is mlp; write [mlp]"),
        ("lowrank: {targets: [1]}", "lowrank.targets is [1]; write a list such as [a,b]"),
        ("lowrank: {mode: fancy}", "lowrank.mode is fancy; write one of full, fixed, inrank, efficient"),
        ("lowrank: {freeze_step: x}", "lowrank.freeze_step is x; write a whole number or one of auto or null"),
    ],
)
def test_what_is_wrong_in_a_file(tmp_path: Path, text: str, says: str) -> None:
    error = refused_file(tmp_path, text + "\n")
    assert says in error
    # A wrong value is named by its key; what has no key is named by its file.
    assert error.startswith(f"{tmp_path}/config.yaml") or not says.startswith(("unknown", "section", "is", "holds"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--train.steps"], "--train.steps lacks its value; write --train.steps VALUE"),
        (["--train.steps", "--run.seed", "1"], "--train.steps lacks its value; write --train.steps VALUE"),
        (["--train.steps="], "train.steps is ''; write a whole number"),
        (["--train.steps", "null"], "train.steps is null; write a whole number"),
        (["--train.steps", "[1"], "train.steps is '[1'; write a whole number"),
        (["--lowrank.targets", "mlp,attention"], "lowrank.targets is mlp,attention; write [mlp,attention]"),
        (["--lowrank.targets", "[[a]]"], "lowrank.targets is [[a]]; write a list such as [a,b]"),
        (["steps"], "'steps' is no option; write overrides as --section.key VALUE"),
        (["-x"], "'-x' is no option"),
        (["--"], "'--' is no option"),
        (["--run.name="], "run.name is ''; write text"),
        (["--data.cache_dir", ""], "data.cache_dir is ''; write text"),
        (["--optimizer.lr", "-1e-3"], "optimizer.lr is -0.001"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_in_the_overrides(words: list[str], says: str) -> None:
    assert says in refused(*words)


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        ("--lowrank.mode=full", "lowrank.targets=[all] lowrank.threshold=0.8"),
        ("--lowrank.mode=fixed --lowrank.base=frozen", "lowrank.buffer=4 lowrank.warmup_steps=9"),
        ("--lowrank.mode=inrank", "lowrank.freeze_step=300"),
        ("--parallel.engine=local", "parallel.shard_size=2"),
        ("--parallel.engine=ddp", "parallel.deepspeed={flops_profiler:{}} parallel.shard_size=2"),
        ("--parallel.engine=zero2", "parallel.shard_size=2"),
        ("--schedule.name=linear", "schedule.decay_fraction=0.1"),
        ("--schedule.name=constant", "schedule.decay_fraction=0.1 schedule.min_lr_ratio=0.1"),
        ("--eval.interval=0", "eval.batches=2"),
        ("--tokenizer.path=x", "tokenizer.kind=unigram tokenizer.max_training_bytes=9"),
        ("--data.source=stdlib", "data.name=a data.paths=[a] data.validation_paths=[a] data.validation_split=a"),
        ("--data.source=stdlib", "data.config=a data.join_rows=true data.text_column=a data.train_split=a"),
        (
            "--data.source=files --data.paths=[a] --data.validation_paths=[b]",
            "data.name=a data.validation_fraction=0.1",
        ),
        ("--data.source=hub --data.name=a", "data.paths=[a] data.validation_fraction=0.1"),
        ("--data.source=hub --data.name=a", "data.document_separator=x"),
    ],
)
def test_a_setting_without_effect_is_told_when_it_was_given(words: str, idle: str) -> None:
    model = [word for word in MODEL if "rank" not in word]
    config, given_keys = load_config(None, [*model, *words.split()])
    assert config.without_effect(given_keys) == []
    config, given_keys = load_config(None, [*model, *words.split(), *(f"--{each}" for each in idle.split())])
    told = [sentence.split(" has no effect: ")[0] for sentence in config.without_effect(given_keys)]
    assert told == [each.split("=")[0] for each in idle.split()]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_config_of_a_run_brings_no_warnings(path: Path, tmp_path: Path) -> None:
    """It gives a value to every setting, also to those that its run did not use."""
    (tmp_path / "config.yaml").write_text(load_config(path)[0].to_yaml(), encoding="utf-8")
    config, given_keys = load_config(tmp_path / "config.yaml")
    assert config.without_effect(given_keys) == []


def test_the_command_warns_of_settings_without_effect(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = str(file_named("gpt2-small-published"))
        main(["train", "--config", config, "--print-config", "--schedule.decay_fraction", "0.3"])
    assert [r.getMessage() for r in caplog.records] == [
        "warning: schedule.decay_fraction has no effect: schedule.name is linear"
    ]


def test_an_override_silences_the_settings_of_the_file_that_it_makes_idle(tmp_path: Path) -> None:
    """But not what the file itself sets in vain, nor what is an override as well."""
    file = tmp_path / "config.yaml"
    base = file_named("gpt2-small-published")
    file.write_text(f"base: {base}\nlowrank: {{threshold: 0.5}}\nschedule: {{decay_fraction: 0.3}}\n")
    full = ["--lowrank.mode", "full"]
    told = {}
    for words in ([], full, [*full, "--lowrank.threshold", "0.6"]):
        config, given = load_config(file, words)
        told[len(words)] = [sentence.split()[0] for sentence in config.without_effect(given)]
    assert "schedule.decay_fraction" in told[0] and told[2] == told[0]
    assert {*told[4]} == {*told[0], "lowrank.threshold"}


def test_help_lists_every_setting_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for dotted in SETTINGS:
        meaning = shown.partition(f"--{dotted} VALUE ")[2].partition("--")[0]
        assert len(meaning.rpartition(" (")[0]) > 10, dotted


def test_what_a_resumed_run_cannot_change_exists() -> None:
    for section, kind in SECTIONS.items():
        named = {*kind.ON_RESUME.free, *kind.ON_RESUME.fixed} - {"*"}
        assert {f"{section}.{name}" for name in named} <= set(SETTINGS)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--lowrank.final=per_layer", True),
        ("--optimizer.name=spectron --lowrank.final=per_layer --lowrank.mode=inrank", True),
        ("--lowrank.final=per_layer --lowrank.mode=fixed", False),
        ("", True),
        ("--lowrank.mode=full --optimizer.name=muon", False),
        ("--lowrank.final=per_layer --optimizer.name=adamw", False),
    ],
)
def test_a_rank_that_is_not_of_the_data_is_told(words: str, told: bool) -> None:
    config, _ = load_config(file_named("quickstart"), words.split())
    assert bool(config.cautions()) == told


def test_changed_settings_are_those_that_are_not_the_default() -> None:
    path = file_named("quickstart")
    before = load_config(path)[0].changed()
    assert before["lowrank.threshold"] == 0.95 and "lowrank.base" not in before  # decay is the default
    after = load_config(path, ["--lowrank.base=frozen", "--optimizer.beta1=0.9"])[0].changed()
    assert after == before | {"lowrank.base": "frozen"}


def test_a_file_changes_settings_of_its_base(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "first.yaml").write_text(made("--optimizer.lr=0.5", "--train.steps=700").to_yaml())
    (tmp_path / "configs/second.yaml").write_text("base: ../first.yaml\noptimizer: {name: muon}\n")
    (tmp_path / "third.yaml").write_text("base: configs/second.yaml\ntrain: {steps: 900}\nlowrank: {mode: full}\n")
    config, given = load_config(tmp_path / "third.yaml", ["--run.seed=3"])
    assert (config.optimizer.lr, config.optimizer.name, config.train.steps) == (0.5, "muon", 900)
    assert given == {"train.steps", "lowrank.mode", "run.seed"}  # a full model is not told of its base's ranks
    assert load_config(tmp_path / "first.yaml")[0].train.steps == 700
    (tmp_path / "fourth.yaml").write_text("base: first.yaml\nlowrank: {mode: fixed, base: none}\n")
    (tmp_path / "fifth.yaml").write_text("base: fourth.yaml\nlowrank: {mode: full}\n")
    assert load_config(tmp_path / "fifth.yaml")[0].lowrank == LowRankSettings(mode="full")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base: [a]\n", "base is [a]; write the file whose settings it takes"),
        ("base: none.yaml\n", "none.yaml cannot be read"),
        ("base: config.yaml\n", "base config.yaml is based on this file itself"),
        ("base: other.yaml\n", "other.yaml: base config.yaml is based on this file itself"),
    ],
)
def test_bases_that_are_none(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "other.yaml").write_text("base: config.yaml\n")
    assert says in refused_file(tmp_path, text)
