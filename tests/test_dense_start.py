"""Layers that are dense first, then factored, grown and frozen: on every engine, and resumed on other processes."""

from pathlib import Path
from typing import Any

import pytest
from pool import Pool
from runs import Run, short_config, train
from sharing import nightly, slow
from test_checkpoint import cut

FIXED: dict[str, Any] = {
    "lowrank__mode": "fixed", "lowrank__base": "none", "lowrank__dense_fraction": 0.4, "lowrank__initial_budget": 0.4,
    "lowrank__factorized_lr_scale": 0.5,
}  # fmt: skip
"""Factored after step 5 of 12."""

GROWING: dict[str, Any] = {
    "lowrank__base": "none", "lowrank__dense_fraction": 0.3, "lowrank__freeze_step": 9, "lowrank__threshold": 0.5,
}  # fmt: skip
"""Factored after step 4 of 12, frozen after step 9."""


def every_step(corpus: Path, folder: Path, engine: str, world_size: int, **changes: Any) -> Any:
    return short_config(
        corpus, run__dir=folder, parallel__engine=engine, train__global_batch_size=6,
        train__micro_batch_size=6 // world_size, checkpoint__interval=1, checkpoint__keep=20, **changes,
    )  # fmt: skip


def actions(records: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(record["step"], record["action"]) for record in records if record["kind"] == "rank_event"]


@pytest.mark.parametrize("way", [slow("fixed"), nightly("growing")])
def test_saved_on_two_processes_it_goes_on_with_three(corpus: Path, tmp_path: Path, pool: Pool, way: str) -> None:
    """From the last checkpoint with dense layers, the first with factors, and one after that."""
    changes, factored = (FIXED, 5) if way == "fixed" else (GROWING, 4)
    two = every_step(corpus, tmp_path / "2", "fsdp", 2, **changes)
    straight = pool.run("runs:train_in_worker", two, world_size=2)
    assert actions(straight[0].records)[0] == (factored, "factorise")
    for step in (factored - 1, factored) if way == "fixed" else (factored - 1, factored, 7):
        run = cut(tmp_path / "2", tmp_path / f"3 at {step}", step)
        three = every_step(corpus, run, "fsdp", 3, **changes)
        results = pool.run("runs:train_in_worker", three, True, world_size=3)
        assert results[0].losses() == pytest.approx(straight[0].losses()[step:], rel=1e-5)
        assert all(result.table == straight[0].table for result in results)


@pytest.mark.parametrize(
    ("engine", "world_size"),
    [
        slow("local", 1),
        slow("ddp", 2),
        slow("fsdp", 2),
        slow("zero1", 2),
        slow("zero3", 2),
        nightly("zero0", 2),
        nightly("zero2", 2),
    ],
)
def test_every_engine_factors_grows_freezes_and_resumes(
    corpus: Path, tmp_path: Path, pool: Pool, engine: str, world_size: int
) -> None:
    def run(at: int | None, name: str, threshold: float) -> list[Run]:
        """The run from a checkpoint on, or the straight one."""
        folder = tmp_path / name if at is None else cut(tmp_path / "straight", tmp_path / name, at)
        config = every_step(corpus, folder, engine, world_size, **GROWING | {"lowrank__threshold": threshold})
        return pool.run("runs:train_in_worker", config, at is not None, world_size=world_size)

    straight = run(None, "straight", 0.5)
    assert actions(straight[0].records) == [(4, "factorise"), (9, "freeze")]
    alone, table = train(every_step(corpus, tmp_path / "alone", "local", 1, **GROWING))
    assert straight[0].losses() == pytest.approx(alone.losses(), rel=1e-4)
    assert all(result.table == table for result in straight)
    for step in (3, 4):
        resumed = run(step, f"at {step}", 0.5)
        assert resumed[0].losses() == straight[0].losses()[step:], "exactly"
        assert resumed[0].table == table
    # What a dense weight had beyond its rank is gone, so nothing grows soon unless more is asked for.
    grown = run(4, "grown", 0.999)
    assert actions(grown[0].records) == [(6, "grow"), (9, "freeze")]
    config = every_step(
        corpus,
        cut(tmp_path / "alone", tmp_path / "alone grown", 4),
        "local",
        1,
        **GROWING | {"lowrank__threshold": 0.999},
    )
    alone, table = train(config, resume=True)
    assert grown[0].losses() == pytest.approx(alone.losses(), rel=1e-4)
    assert all(result.table == table for result in grown)
