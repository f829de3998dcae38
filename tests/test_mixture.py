"""Mixtures of sources: shares, order, resume, and what is validated."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import small_config, train

from inrank_dist.config import load_config
from inrank_dist.data import DataSettings, Loader, Prepared, TokenizerSettings, find_prepared, prepare
from inrank_dist.data.loader import LoaderState
from inrank_dist.data.order import SampleOrder, _floor_sum
from inrank_dist.data.permutation import stable_permutation
from inrank_dist.runtime.errors import UserError
from inrank_dist.train.evaluation import validation_loss


def test_floor_sum_by_hand() -> None:
    draw = random.Random(0)
    for _ in range(500):
        count, modulus = draw.randint(0, 30), draw.randint(1, 50)
        factor, offset = draw.randint(0, 99), draw.randint(0, 99)
        expected = sum((factor * i + offset) // modulus for i in range(count))
        assert _floor_sum(count, modulus, factor, offset) == expected


def test_one_source_has_the_order_it_always_had() -> None:
    """Checkpoints of earlier versions continue with it."""
    rows = SampleOrder([7], [1.0], 3).rows(0, 14).tolist()
    assert rows == [*stable_permutation(7, 3, 0).tolist(), *stable_permutation(7, 3, 1).tolist()]


@pytest.mark.parametrize("seed", [0, 1, 5])
@pytest.mark.parametrize("weights", [(1, 1), (1, 3), (0.05, 0.2, 0.75), (1, 1e-4), (2, 3, 5, 7, 11)])
def test_shares_hold_at_every_position(weights: tuple[float, ...], seed: int) -> None:
    """Independent random choices would be off by sqrt(n); these are off by a few rows."""
    sizes = [50, 70, 110, 130, 170][: len(weights)]
    order, count = SampleOrder(sizes, weights, seed), 5000
    bounds = np.cumsum([0, *sizes])
    sources = np.searchsorted(bounds, order.rows(0, count), side="right") - 1
    for source, weight in enumerate(weights):
        taken = np.cumsum(sources == source)
        expected = np.arange(1, count + 1) * weight / sum(weights)
        assert np.abs(taken - expected).max() < 6
        for position in (0, 1, 17, 4321, count):
            assert order.taken(source, position) == (0 if position == 0 else taken[position - 1])


def test_each_source_is_used_up_before_it_repeats() -> None:
    sizes, count = [10, 23], 400
    rows = SampleOrder(sizes, [3.0, 1.0], 0).rows(0, count)
    for source, size in enumerate(sizes):
        own = rows[rows < 10] if source == 0 else rows[rows >= 10]
        epochs = [own[start : start + size] for start in range(0, len(own) // size * size, size)]
        assert all(sorted(epoch) == list(range(source * 10, source * 10 + size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs) > 3


def test_the_order_does_not_depend_on_how_it_is_read() -> None:
    """Processes read slices, and a resumed run begins anywhere."""
    whole = SampleOrder([10, 23, 5], [1, 2, 3], 4).rows(0, 300)
    order = SampleOrder([10, 23, 5], [1, 2, 3], 4)
    for first, count in ((290, 10), (0, 1), (7, 100), (123, 1)):
        assert order.rows(first, count).tolist() == whole[first : first + count].tolist()
    far = SampleOrder([1000, 999], [0.3, 0.7], 0)
    assert far.taken(0, 10**15) == pytest.approx(0.3e15, abs=50), "no scan of what came before"
    assert len(far.rows(10**15, 64)) == 64


def write(folder: Path, name: str, seed: int, documents: int = 30) -> str:
    """Files of one source, with an alphabet of its own. Returns their glob."""
    draw = random.Random(seed)
    (folder / name).mkdir(parents=True)
    for index in range(documents):
        text = "".join(draw.choices("abcdefgh \n" if seed % 2 else "stuvwxyz .\n", k=draw.randint(150, 450)))
        (folder / name / f"{index:02}.txt").write_text(text)
    return str(folder / name / "*.txt")


def mixture(folder: Path, *weights: float, **changes: Any) -> DataSettings:
    """Settings of two sources ``a`` and ``b`` in ``folder``."""
    for seed, name in enumerate("ab"):
        if not (folder / name).exists():
            write(folder, name, seed)
    sources = [
        {"source": "files", "paths": [str(folder / name / "*.txt")], "validation_fraction": 0.2, "label": name}
        | {"weight": weight}
        for name, weight in zip("ab", weights, strict=True)
    ]
    return DataSettings(source="mixture", sources=sources, cache_dir=str(folder / "cache"), **changes)


def prepared(data: DataSettings, **tokenizer: Any) -> Prepared:
    return prepare(data, TokenizerSettings(vocab_size=300, **tokenizer), 16, progress=False)


def test_a_mixture_holds_its_sources(tmp_path: Path) -> None:
    found = prepared(mixture(tmp_path, 3.0, 1.0))
    (a, b) = found.sources
    assert (a.label, a.share, b.label) == ("a", 0.75, "b")
    for part in ("train", "validation"):
        rows = getattr(found, part)["input_ids"][:]
        assert rows == [*getattr(a.data, part)["input_ids"][:], *getattr(b.data, part)["input_ids"][:]]
    assert found.train_tokens == a.data.train_tokens + b.data.train_tokens
    alone = DataSettings(
        source="files", paths=[str(tmp_path / "a/*.txt")], validation_fraction=0.2, cache_dir=str(tmp_path / "cache")
    )
    path = str(a.data.folder / "tokenizer.model")
    assert prepared(alone, path=path).folder == a.data.folder, "a source is the same whether it is mixed or not"
    assert a.data.bytes_per_token and b.data.bytes_per_token
    expected = 0.75 * a.data.bytes_per_token + 0.25 * b.data.bytes_per_token
    assert found.bytes_per_token == pytest.approx(expected, rel=1e-12)
    expected = 0.75 * a.data.unigram_entropy + 0.25 * b.data.unigram_entropy
    assert found.unigram_entropy == pytest.approx(expected, rel=1e-12)


def test_what_identifies_a_mixture(tmp_path: Path) -> None:
    data, tokenizer = mixture(tmp_path, 3.0, 1.0), TokenizerSettings(vocab_size=300)
    assert find_prepared(data, tokenizer, 16) is None
    first = prepared(data)
    again = find_prepared(data, tokenizer, 16)
    assert again is not None and again.fingerprint == first.fingerprint
    assert prepared(mixture(tmp_path, 6.0, 2.0)).fingerprint == first.fingerprint, "weights are relative"
    path = str(first.sources[0].data.folder / "tokenizer.model")
    one, other = (prepared(mixture(tmp_path, *weights), path=path) for weights in ((3.0, 1.0), (1.0, 1.0)))
    assert one.fingerprint == first.fingerprint != other.fingerprint
    assert [source.data.folder for source in one.sources] == [source.data.folder for source in other.sources]
    write(tmp_path, "a/more", 4)
    (tmp_path / "a/more/00.txt").rename(tmp_path / "a/new.txt")
    assert find_prepared(data, tokenizer, 16) is None, "the text of a source has changed"


def test_a_trained_tokenizer_knows_every_source(tmp_path: Path) -> None:
    found = prepared(mixture(tmp_path, 1.0, 1.0))
    pieces = " ".join(found.tokenizer.decode([index]) for index in range(258, found.tokenizer.vocab_size))
    assert set("abcdefgh") & set(pieces) and set("stuvwxyz") & set(pieces)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_of_a_mixture_on_several_processes(tmp_path: Path, world_size: int) -> None:
    data = prepared(mixture(tmp_path, 3.0, 1.0))
    shape: dict[str, Any] = {"global_batch_size": 12, "micro_batch_size": 2, "seed": 5}
    loaders = [Loader(data, rank=rank, world_size=world_size, **shape) for rank in range(world_size)]
    batches = [[batch for one in loaders for batch in one.next_batch()] for _ in range(20)]
    ids = [sample for batch in batches for part in batch for sample in part.sample_ids]
    sizes = [len(source.data.train) for source in data.sources]
    assert ids == SampleOrder(sizes, [3.0, 1.0], 5).rows(0, 240).tolist()
    rows = data.train["input_ids"][:]
    assert all(
        row == rows[sample][:-1]
        for batch in batches
        for part in batch
        for row, sample in zip(part.inputs.tolist(), part.sample_ids, strict=True)
    )
    assert sum(sample < sizes[0] for sample in ids) == pytest.approx(180, abs=2)
    state = LoaderState.from_dict(json.loads(json.dumps(loaders[0].state().to_dict())))
    resumed = Loader(data, rank=0, world_size=1, state=state, **shape)
    straight = [sample for one in loaders for batch in one.next_batch() for sample in batch.sample_ids]
    assert [sample for batch in resumed.next_batch() for sample in batch.sample_ids] == straight


def test_validation_is_the_weighted_mean(tmp_path: Path) -> None:
    data = prepared(mixture(tmp_path, 3.0, 1.0))

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """As if the loss of a token were its id."""
        return targets[targets >= 0].sum().float()

    options: dict[str, Any] = {"batch_size": 3, "device": torch.device("cpu")}
    found = validation_loss(data, loss_of, max_sequences=None, **options)
    assert found is not None
    means = {s.label: np.mean([row[1:] for row in s.data.validation["input_ids"][:]]) for s in data.sources}
    assert found.sources == pytest.approx(means)
    assert found.loss == pytest.approx(0.75 * means["a"] + 0.25 * means["b"])
    assert found.tokens == data.validation_tokens
    some = validation_loss(data, loss_of, max_sequences=8, **options)
    assert some is not None and some.tokens == 8 * 16, "6 of a and 2 of b"


def mixed_run(folder: Path, **changes: Any) -> Any:
    sources = [{**source, "validation_fraction": 0.2} for source in mixture(folder, 3.0, 1.0).sources]
    values = {"data__source": "mixture", "data__paths": "[]", "data__sources": json.dumps(sources)}
    return small_config(folder, **values, data__validation_fraction=0.02, **changes)


def test_a_run_on_a_mixture_resumes_exactly(tmp_path: Path) -> None:
    steps = {"train__steps": 8, "lowrank__warmup_steps": 6, "lowrank__interval": 2, "eval__interval": 4}
    straight, _ = train(mixed_run(tmp_path, **steps))
    halves = {**steps, "checkpoint__interval": 3, "checkpoint__keep": 9, "run__dir": tmp_path / "halves"}

    def stop(trainer: Any) -> None:
        step = trainer.config.train.steps // 2
        trainer.stop.signal = None
        original = trainer.loader.next_batch

        def limited() -> Any:
            if trainer.step >= step:
                raise KeyboardInterrupt
            return original()

        trainer.loader.next_batch = limited

    with pytest.raises(KeyboardInterrupt):
        train(mixed_run(tmp_path, **halves), hook=stop)
    resumed, _ = train(mixed_run(tmp_path, **halves), resume=True)
    assert resumed.losses() == straight.losses()[3:] and resumed.samples == straight.samples[3:]
    evaluation = next(record for record in straight.records if record["kind"] == "eval")
    expected = 0.75 * evaluation["sources"]["a"] + 0.25 * evaluation["sources"]["b"]
    assert evaluation["loss"] == pytest.approx(expected, rel=1e-12)
    start = next(record for record in straight.records if record["kind"] == "start")
    assert [source["share"] for source in start["sources"]] == [0.75, 0.25]


FILES = {"source": "files", "paths": ["a.txt"]}


@pytest.mark.parametrize(
    ("sources", "error"),
    [
        ([], r"data\.sources has 0 items; data\.source mixture needs two or more; write"),
        ([FILES], r"data\.sources has 1 items"),
        ([FILES, {"source": "stdlib", "wieght": 2}], r"data\.sources has the unknown setting .wieght.*weight"),
        ([FILES, {"cache_dir": "x"}], r"item 2 of data\.sources has the unknown setting 'cache_dir'"),
        ([FILES, {"source": "stdin"}], r"item 2 of data\.sources has source stdin; write one of stdlib"),
        ([FILES, {"source": "stdlib", "weight": 0}], r"item 2 of data\.sources has weight 0; write a number from"),
        ([FILES, {"source": "stdlib", "weight": 1e308}], r"item 2 of data\.sources has weight 1e\+308; write a number"),
        ([FILES, {"source": "stdlib", "label": "a\ud800"}], r"item 2 of data\.sources has label .*; write at most 64"),
        ([FILES, {"source": "stdlib", "label": "a (b)"}], r"item 2 of data\.sources has label 'a \(b\)'; write"),
        ([FILES, {"source": "stdlib", "weight": "2"}], r"item 2 of data\.sources has weight '2'; write a number"),
        ([FILES, {"source": "files"}], r"item 2 of data\.sources: data\.paths is empty.*; write data\.paths"),
        ([FILES, {"source": "mixture"}], r"item 2 of data\.sources is a mixture itself"),
        ([{**FILES, "label": "x"}, {"label": "x"}], r"data\.sources has the label x twice"),
        ([FILES, {"source": "stdlib", "text_column": "a"}], r"item 2.*text_column has no effect: .*; leave it out"),
    ],
)  # fmt: skip
def test_mistakes_in_sources(sources: list[dict[str, Any]], error: str) -> None:
    with pytest.raises(UserError, match=error):
        DataSettings(source="mixture", sources=sources)


def test_errors_name_the_source(tmp_path: Path) -> None:
    data = mixture(tmp_path, 1.0, 1.0)
    (tmp_path / "b/00.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"in source b of data\.sources: .*00\.txt"):
        prepared(data)
    tokens = [*data.sources[:1], {"source": "tokens", "paths": ["x.npy"], "validation_paths": ["y.npy"]}]
    with pytest.raises(UserError, match=r"source 2-tokens of data\.sources has tokens but tokenizer\.path is null"):
        prepared(DataSettings(source="mixture", sources=tokens, cache_dir=str(tmp_path / "cache")))


def test_settings_of_one_source_have_no_effect_on_a_mixture(tmp_path: Path) -> None:
    words = [f"--data.sources={json.dumps(mixture(tmp_path, 1.0, 1.0).sources)}", "--data.source=mixture"]
    model = ["--model.num_layers=1", "--model.num_heads=1", "--model.hidden_size=8", "--model.max_seq_len=8"]
    config, given = load_config(None, [*words, *model, "--data.max_bytes=5"])
    assert config.without_effect(given) == ["data.max_bytes has no effect: data.source is mixture"]
    text = config.to_yaml()
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert load_config(file)[0].to_yaml() == text, "a resumed run reads it again"


def test_a_leak_between_sources_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What one source holds out must not be what another trains on."""
    for seed, name in enumerate("ab"):
        write(tmp_path, name, seed)
    both = {"source": "files", "paths": [f"{tmp_path}/a/*.txt", f"{tmp_path}/b/*.txt"], "label": "both"}
    alone = {"source": "files", "paths": [f"{tmp_path}/a/*.txt"], "validation_fraction": 0.3, "label": "alone"}
    leaking = DataSettings(source="mixture", sources=[alone, both], cache_dir=str(tmp_path / "cache"))
    prepared(leaking)
    assert "validation documents" in caplog.text
    assert "of source alone are in the training text of source both, so its validation loss is too low" in caplog.text
    caplog.clear()
    prepared(mixture(tmp_path, 1.0, 1.0))
    assert "warning" not in caplog.text


class TestValidationBytes:
    """A validation set of fixed size."""

    def settings(self, folder: Path, **changes: Any) -> DataSettings:
        return DataSettings(source="files", paths=[f"{folder}/a/*.txt"], cache_dir=f"{folder}/cache", **changes)

    def facts(self, found: Prepared) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((found.folder / "prepared.json").read_text())
        return facts

    def test_documents_are_held_out_up_to_it(self, tmp_path: Path) -> None:
        write(tmp_path, "a", 0)
        one = self.facts(prepared(self.settings(tmp_path, validation_bytes=1000)))
        assert one["validation_bytes"] == 1000
        write(tmp_path, "a/more", 2, documents=60)
        for path in (tmp_path / "a/more").iterdir():
            path.rename(tmp_path / f"a/m{path.name}")
        two = self.facts(prepared(self.settings(tmp_path, validation_bytes=1000)))
        assert two["validation_bytes"] == 1000 and two["train_bytes"] > 2 * one["train_bytes"]

    def test_large_documents_make_up_for_too_few_small_ones(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        for index, size in enumerate([200, *[3000] * 9]):
            (tmp_path / f"a/{index}.txt").write_text(chr(ord("a") + index) * size)
        facts = self.facts(prepared(self.settings(tmp_path, validation_bytes=2000)))
        assert facts["validation_bytes"] == 2000 and facts["train_bytes"] == 8 * 3000
        facts = self.facts(prepared(self.settings(tmp_path, validation_bytes=500)))
        assert facts["validation_bytes"] == 500

    def test_separate_validation_data_is_truncated(self, tmp_path: Path) -> None:
        write(tmp_path, "a", 0)
        paths = [write(tmp_path, "v", 2)]
        found = prepared(self.settings(tmp_path, validation_paths=paths, validation_bytes=1000))
        assert self.facts(found)["validation_bytes"] == 1000

    def test_more_than_half_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path, "a", 0)
        with pytest.raises(UserError, match=r"data\.validation_bytes is 8000, more than half of the \d+ bytes"):
            prepared(self.settings(tmp_path, validation_bytes=8000))
        with pytest.raises(UserError, match=r"data\.validation_bytes is 0; write 1 or more"):
            self.settings(tmp_path, validation_bytes=0)
