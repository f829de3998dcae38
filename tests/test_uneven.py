"""Shards that differ in size or are empty give the run of one process: an empty shard that is skipped where the others
take part in a collective hangs, and a padded row that is counted changes a Gram."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from runs import assert_same_run, small_config, trained_once
from sharing import nightly, slow

from inrank_dist.config import Config

VOCABULARY = 1001


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of made-up words, enough of them to fill the vocabulary."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "corpus").mkdir()
    generator = torch.Generator().manual_seed(1)
    letters = torch.randint(26, (1000, 6), generator=generator) + ord("a")
    known = ["".join(map(chr, word)) for word in letters.tolist()]
    for index in range(20):
        picks = torch.randint(len(known), (400,), generator=generator).tolist()
        (folder / "corpus" / f"{index:02d}.txt").write_text(" ".join(known[i] for i in picks))
    return folder


def uneven_config(words: Path, **changes: Any) -> Config:
    """Ten steps with a growth and the freeze, in batches that 3 and 5 processes divide."""
    return small_config(
        words,
        tokenizer__vocab_size=VOCABULARY,
        lowrank__interval=4,
        lowrank__warmup_steps=8,
        train__steps=10,
        train__global_batch_size=15,
        train__micro_batch_size=1,
        **changes,
    )


WIDTHS = {
    "10 and 7": {"model__hidden_size": 10, "model__intermediate_size": 7, "lowrank__max_rank_fraction": 0.3},
    "64": {"model__hidden_size": 64, "lowrank__max_rank_fraction": 0.05},
}


@pytest.mark.parametrize(
    ("engine", "widths", "world_size"),
    [
        slow("fsdp", "10 and 7", 5),
        nightly("fsdp", "10 and 7", 3),
        slow("fsdp", "64", 3),
        nightly("fsdp", "64", 5),
        slow("zero1", "10 and 7", 5),
        nightly("zero2", "10 and 7", 3),
        nightly("zero3", "10 and 7", 5),
        slow("zero3", "64", 3),
    ],
)
def test_uneven_and_empty_shards_give_the_run_of_one_process(
    pool: Pool, words: Path, engine: str, widths: str, world_size: int
) -> None:
    """Vocabulary 1,001 over 3 and 5 processes, ranks 1 to 3. 7 rows over 5 processes are 2, 2, 2, 1 and none; 64 over 5
    are 13 each and 12; 1,001 over 5 are 201 each and 197."""
    config = uneven_config(words, **WIDTHS[widths])
    reference = trained_once(config)
    config.parallel.engine = engine
    assert [record["action"] for record in reference.of_kind("rank_event")] == ["grow", "freeze"]
    assert {rank for rank, _, _ in reference.table.values()} <= {1, 2, 3}
    result = pool.run("runs:train_in_worker", config, world_size=world_size, timeout=100)
    assert_same_run(result, reference, world_size)


@pytest.mark.parametrize(
    ("name", "mode"), [slow("muon", "full"), slow("lora_muon", "efficient"), nightly("spectron", "efficient")]
)
def test_matrices_whose_rows_are_uneven_or_none(pool: Pool, words: Path, name: str, mode: str) -> None:
    """Orthogonalised updates over 5 processes of which one holds no row of some matrices and owns none of the last."""
    config = uneven_config(words, **WIDTHS["10 and 7"], optimizer__name=name, lowrank__mode=mode)
    reference = trained_once(config)
    config.parallel.engine = "fsdp"
    result = pool.run("runs:train_in_worker", config, world_size=5, timeout=100)
    assert_same_run(result, reference, 5)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("engine", "changes"), [("fsdp", {"optimizer__name": "lora_muon"}), ("fsdp", {}), ("zero2", {}), ("zero3", {})]
)
def test_dense_layers_become_factors_where_rows_are_uneven_or_none(
    pool: Pool, words: Path, engine: str, changes: dict[str, str]
) -> None:
    dense = {"lowrank__base": "none", "lowrank__dense_fraction": 0.4, "lowrank__threshold": 0.6}
    config = uneven_config(words, **WIDTHS["10 and 7"], **dense, **changes)
    reference = trained_once(config)
    config.parallel.engine = engine
    result = pool.run("runs:train_in_worker", config, world_size=5, timeout=150)
    assert_same_run(result, reference, 5)
