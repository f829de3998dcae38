"""Documents in packed rows are kept apart: no attention across them, and positions that start again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_checks import with_values
from pool import Pool
from runs import short_config, train, trained_once
from torch import Tensor

from inrank_dist.config import Config
from inrank_dist.models import LanguageModel, ModelSettings, build_model
from inrank_dist.models.documents import find_documents
from inrank_dist.runtime.errors import UserError

SEPARATOR, VOCAB, LENGTH = 7, 61, 12


def test_documents_by_hand() -> None:
    ids = torch.tensor([[3, 4, SEPARATOR, 5, SEPARATOR, SEPARATOR, 6], [SEPARATOR, 1, 2, 3, 4, 5, 6]])
    mask, positions = find_documents(ids, SEPARATOR, mask=True, restart=True)
    assert positions is not None and positions.tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    numbers = [[0, 0, 1, 1, 2, 3, 3], [0] * 7]
    assert mask is not None and mask.shape == (2, 1, 7, 7)
    for row in range(2):
        for query in range(7):
            expected = [key <= query and numbers[row][key] == numbers[row][query] for key in range(7)]
            assert mask[row, 0, query].tolist() == expected
    assert find_documents(ids, SEPARATOR, mask=False, restart=False) == (None, None)


def model(name: str, **changes: Any) -> LanguageModel:
    sizes = {"num_layers": 2, "num_heads": 4, "hidden_size": 16, "max_seq_len": 2 * LENGTH}
    made = build_model(ModelSettings(name=name, **sizes, **changes), VOCAB, SEPARATOR)
    values = made.initial_values(0)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            parameter.copy_(values.parameter(key) * 5)  # so that attention is not uniform
    return made.eval()


def packed(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two documents that begin with the separator, and the row that holds both. (1, T) each."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(8, VOCAB, (1, length), generator=generator) for length in (LENGTH - 3, LENGTH))
    first[0, 0] = second[0, 0] = SEPARATOR
    return first, second, torch.cat((first, second), dim=1)


KINDS = [
    ("gpt2", {}),
    ("gpt2", {"layer_crossing": True}),
    ("llama", {"num_kv_heads": 2}),
    ("llama", {"layer_crossing": True}),
]


@pytest.mark.parametrize(("name", "changes"), KINDS)
def test_a_packed_document_has_the_logits_it_has_alone(name: str, changes: dict[str, Any]) -> None:
    apart = model(name, mask_documents=True, restart_positions=True, **changes)
    first, second, both = packed(0)
    with torch.no_grad():
        together = apart(both)
        alone = torch.cat((apart(first), apart(second)), dim=1)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        plain = model(name, **changes)(both)
        assert (plain - alone)[:, first.size(1) :].abs().max() > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_each_setting_by_itself(name: str) -> None:
    """Learned positions tell a masked document from the same one alone; positions alone hide nothing."""
    first, second, both = packed(1)
    begin = first.size(1)
    with torch.no_grad():
        masked = model(name, mask_documents=True)
        other = both.clone()
        other[0, 1:begin] = 9
        torch.testing.assert_close(masked(both)[:, begin:], masked(other)[:, begin:], rtol=0, atol=0)
        difference = (masked(both)[:, begin:] - masked(second)).abs().max()
        assert difference > 1e-2 if name == "gpt2" else difference < 1e-4, "rotary positions are relative"
        restarted = model(name, restart_positions=True)
        assert (restarted(both)[:, begin:] - restarted(other)[:, begin:]).abs().max() > 1e-3
        assert (restarted(both) - model(name)(both))[:, begin:].abs().max() > 1e-3


def test_a_model_that_does_not_know_the_separator_does_not_run() -> None:
    sizes = {"num_layers": 1, "num_heads": 1, "hidden_size": 8, "max_seq_len": 8}
    unknown = build_model(ModelSettings(name="gpt2", **sizes, mask_documents=True), VOCAB)
    with pytest.raises(ValueError, match="set separator_id"):
        unknown(torch.zeros(1, 4, dtype=torch.int64))


class TestHuggingFace:
    """Models of transformers derive the mask from the positions."""

    def settings(self, model_type: str, **changes: Any) -> ModelSettings:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        config = {"model_type": model_type, **sizes, "num_key_value_heads": 1, "head_dim": 16}
        if model_type in ("gpt2", "mamba", "gpt_neox"):
            config = {key: config[key] for key in ("model_type", "hidden_size", "num_hidden_layers")}
            config |= {} if model_type == "mamba" else {"num_attention_heads": 2}
        apart = {"mask_documents": True, "restart_positions": True} | changes
        return ModelSettings(name="hf", config=config, max_seq_len=2 * LENGTH, **apart)

    @pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3", "mistral", "gemma2", "gpt_neox"])
    def test_a_packed_document_has_the_logits_it_has_alone(self, model_type: str) -> None:
        made = with_values(build_model(self.settings(model_type), VOCAB, SEPARATOR))
        first, second, both = packed(2)
        with torch.no_grad():
            alone = torch.cat((made(first), made(second)), dim=1)
            torch.testing.assert_close(made(both), alone, rtol=1e-5, atol=1e-5)

    def test_one_setting_alone_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"model\.restart_positions is false, but the models of transformers"):
            self.settings("llama", restart_positions=False)

    def test_models_that_do_not_keep_documents_apart_are_refused(self, corpus: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"model\.mask_documents is true, but mamba takes no position numbers"):
            build_model(self.settings("mamba"), VOCAB, SEPARATOR)
        config = short_config(
            corpus,
            run__dir=tmp_path,
            model__name="hf",
            model__num_layers=None,
            model__num_heads=None,
            model__hidden_size=None,
            model__config="{model_type: openai-gpt, n_embd: 32, n_layer: 1, n_head: 2}",
            model__mask_documents="true",
            model__restart_positions="true",
            lowrank__targets="[all]",
        )
        with pytest.raises(UserError, match=r"this model of transformers attends to the previous document"):
            train(config)


def words(corpus: Path, folder: Path, **changes: Any) -> Config:
    """A run whose documents are words, so that each row holds several."""
    return short_config(corpus, run__dir=folder, data__document_separator=" ", **changes)


def separated(corpus: Path, folder: Path, **changes: Any) -> Config:
    return words(corpus, folder, model__mask_documents="true", model__restart_positions="true", **changes)


def test_a_run_keeps_documents_apart(corpus: Path, tmp_path: Path) -> None:
    plain = train(words(corpus, tmp_path / "plain"))[0].losses()
    apart = train(separated(corpus, tmp_path / "apart"))[0].losses()
    assert apart != plain and apart[-1] < apart[0]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"engine": "fsdp"}, {"engine": "zero3"}, {"engine": "ddp", "compile": True}])
def test_on_two_processes(corpus: Path, tmp_path: Path, pool: Pool, changes: dict[str, Any]) -> None:
    """Masks go through sharding, activation checkpointing and compilation."""
    alone = trained_once(separated(corpus, tmp_path / "alone", train__micro_batch_size=8))
    config = separated(
        corpus,
        tmp_path / "two",
        parallel__engine=changes["engine"],
        train__compile=str(changes.get("compile", False)).lower(),
        train__activation_checkpointing="true",
    )
    results = pool.run("runs:train_in_worker", config, world_size=2)
    assert results[0].losses() == pytest.approx(alone.losses(), rel=1e-5)
