"""What a rank event costs: bytes between processes, memory, compilations."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from cost_checks import Allocations, Event, measure, random_factors
from pool import Pool
from runs import small_config, train
from sharing import nightly, slow
from torch.profiler import record_function

from inrank_dist.bench.traffic import Counted
from inrank_dist.lowrank.division import ALONE
from inrank_dist.train.loop import Trainer

SHORT: dict[str, Any] = {
    "parallel__engine": "fsdp",
    "train__steps": 5,
    "train__global_batch_size": 6,
    "train__micro_batch_size": 1,
    "lowrank__interval": 2,
    "lowrank__warmup_steps": 4,
    # Every layer grows by its whole buffer: the ranks do not depend on what is learned, nor on the width.
    "lowrank__threshold": 0.999999999,
}
"""Growth after step 2, freeze after step 4."""


def test_no_way_to_another_process_escapes_the_counter(pool: Pool) -> None:
    """The control of the tests below: what they do not see must not exist."""
    for seen in pool.run("cost_checks:all_seen", world_size=2):
        assert len(seen) > 15
        assert [way for way, collectives in seen.items() if not collectives] == []
        assert seen["all_reduce"] == [("allreduce", 12)]


START_MODES = 3
"""Modes of a layer at the start of these runs."""


def travels(event: Event, *, update: bool = False, gradient: bool = False) -> list[int]:
    """Bytes of every all-reduce of an event, in order, by the formulas of the docstrings. Widths do not occur.

    With ``R`` modes before, ``F`` fresh ones and rank ``r`` after the freeze: ``measure_spectra`` 8 * sum R(R+1) and
    8 * sum R; the hash 16; ``orthogonalise`` 8 * sum (RF + FF) and 8 * sum (RF + FF + R); ``freeze_all``
    8 * sum (1 + 2Rr).
    """

    def measured(modes: list[int]) -> list[int]:
        return [8 * sum(R * (R + 1) for R in modes), 8 * sum(modes)]

    before = [old for old, _ in event.modes.values()]
    if update:  # factors and those of the start, side by side; then the products of the layers whose modes change
        bytes_ = [*measured([R + START_MODES for R in before]), 16, *measured(before), 16]
    else:
        bytes_ = [*measured(before), 16]
    if event.action == "freeze":
        return [*bytes_, 8 * sum(1 + 2 * old * rank for old, rank in event.modes.values())]
    grown = [(old, new - old) for old, new in event.modes.values() if new > old]
    orthogonal = [8 * sum(R * F + F * F for R, F in grown), 8 * sum(R * F + F * F + R for R, F in grown)]
    bytes_ += orthogonal
    if gradient:  # ``aim_at_gradient``: the sketches' Grams and their roots, one norm a layer, then as for any growth
        bytes_ += [8 * sum(F * (F + 1) for _, F in grown), 8 * sum(F * F for _, F in grown), 8 * len(grown)]
        bytes_ += measured([R for R, _ in grown]) + orthogonal
    return bytes_


def all_reduces(collectives: list[Counted]) -> list[int]:
    return [size for name, size in collectives if name == "allreduce"]


VARIANTS: dict[str, dict[str, Any]] = {
    "decay": {},
    "update": {"lowrank__base": "none"},
    "gradient": {"lowrank__growth_init": "gradient"},
}


@pytest.mark.parametrize(
    ("variant", "world_size", "shard_size"),
    [
        slow("decay", 2, None),
        ("decay", 3, None),
        pytest.param("update", 2, None, marks=pytest.mark.slow),
        pytest.param("gradient", 2, None, marks=pytest.mark.slow),
        pytest.param("decay", 4, 2, marks=pytest.mark.slow),
    ],
)
def test_an_event_moves_grams_and_answers_and_no_factor(
    pool: Pool, corpus: Path, variant: str, world_size: int, shard_size: int | None
) -> None:
    """A factor or a moment that travelled would need a gather, or an all-reduce that grows with the width."""
    by_width = []
    for hidden, rank in ((32, 4), (64, 4)):
        config = small_config(
            corpus,
            **SHORT | VARIANTS[variant] | {"train__global_batch_size": world_size},
            model__hidden_size=hidden,
            lowrank__max_rank_fraction=rank / hidden,
            parallel__shard_size=shard_size,
        )
        results = pool.run("cost_checks:collectives_of_events", config, world_size=world_size)
        for events in results:
            assert [(event.action, set(event.modes.values())) for event in events] == [
                ("grow", {(3, 5)}),
                ("freeze", {(5, 4)}),
            ]
            for event in events:
                sizes = all_reduces(event.collectives)
                assert sizes == travels(event, update=variant == "update", gradient=variant == "gradient")
                others = [each for each in event.collectives if each[0] != "allreduce"]
                # The gradient's two passes gather and scatter as those of a training step do; nothing else may.
                passes = 2 if variant == "gradient" and event.action == "grow" else 0
                assert others == passes * [each for each in event.next_step if each[0] != "allreduce"]
                for step in (event.step, event.next_step):
                    kinds = {name for name, _ in step}
                    assert any("gather" in kind for kind in kinds), "the counter does not see FSDP2"
                    assert any("reduce_scatter" in kind for kind in kinds), "the counter does not see FSDP2"
        by_width.append(([all_reduces(event.collectives) for event in results[0]], results[0][0].step))
    (narrow, narrow_step), (wide, wide_step) = by_width
    assert narrow == wide
    assert sum(size for _, size in wide_step) > 1.9 * sum(size for _, size in narrow_step)


def test_the_allocation_counter_counts_what_is_known() -> None:
    """The control of the tests below."""
    kept = []
    with Allocations() as allocations:
        with record_function("first"):
            one = torch.zeros(1000, dtype=torch.float64)
            two = one.neg()
            del one
            kept.append(torch.zeros(500, dtype=torch.float64))
        with record_function("second"):
            del two
            torch.linalg.svdvals(torch.eye(10, dtype=torch.float64))
    assert allocations.extra("first") == (16_000, 12_000)
    peak, change = allocations.extra("second")
    assert change == -8000
    assert peak == 0


MEMORY: dict[str, tuple[int, dict[str, Any]]] = {
    "decay": (2, {}),
    "decay, uneven": (3, {}),
    "product": (2, {"lowrank__base": "none", "lowrank__measure": "product"}),
    "product, uneven": (3, {"lowrank__base": "none", "lowrank__measure": "product"}),
    "update": (2, {"lowrank__base": "none", "lowrank__measure": "update"}),
    "zero2": (2, {"parallel__engine": "zero2"}),
    "zero3": (2, {"parallel__engine": "zero3"}),
}


@pytest.mark.parametrize(
    "variant",
    [
        "decay",
        pytest.param("decay, uneven", marks=pytest.mark.slow),
        pytest.param("product", marks=pytest.mark.slow),
        nightly("product, uneven"),
        slow("update"),
        nightly("zero2"),
        nightly("zero3"),
    ],
)
def test_an_event_takes_one_copy_of_the_local_shards_and_the_buckets(pool: Pool, corpus: Path, variant: str) -> None:
    """Beside the Grams and one layer at a time there is at most a second copy of parameters and moments; where shards
    are even, of the factors and their moments alone (FSDP2 pads a short last shard, which copies it). With DeepSpeed
    there are its own buffers as well, three copies in all."""
    world_size, settings = MEMORY[variant]
    shape = {"model__num_layers": 4, "model__num_heads": 4, "model__hidden_size": 256}
    ranks = {"lowrank__initial_rank": 8, "lowrank__buffer": 8}
    config = small_config(corpus, **SHORT | shape | ranks | settings | {"train__global_batch_size": world_size})
    # What ``measure: update`` keeps of the start, in float32, from the first decision to the freeze.
    rows = 4 * (4 * (256 + 256) + 2 * (256 + 1024)) // world_size
    start = 4 * 16 * rows if variant == "update" else 0
    for rank, events in enumerate(pool.run("cost_checks:memory_of_events", config, world_size=world_size, timeout=60)):
        assert [event.action for event in events] == ["grow", "freeze"]
        for event in events:
            if variant.startswith("zero"):
                assert event.peak <= 3 * max(event.before, event.after), f"{event.peak / event.before:.2f} local shards"
                continue
            # The control: the counter finds the change that the shapes tell. A thread of gloo may free a buffer unseen.
            unseen = 0.02 * event.before + event.grams
            kept = start if event.action == "grow" else -start
            assert event.change == pytest.approx(event.after - event.before + kept, abs=unseen)
            extra = event.peak - 4 * event.grams - event.layer - max(kept, 0)
            message = f"process {rank}, {event}: {event.peak / event.before:.2f} local shards"
            assert extra <= max(event.before, event.after), message
            if world_size == 2:
                assert extra <= event.factors, message


@pytest.mark.parametrize("engine", [slow("zero1"), nightly("zero2"), slow("zero3")])
def test_no_process_holds_the_model_to_save_it(pool: Pool, corpus: Path, engine: str) -> None:
    """DeepSpeed cuts otherwise than a checkpoint does: a process takes its share of rows, one whole tensor after
    another."""
    config = small_config(
        corpus,
        model__num_layers=4,
        model__hidden_size=128,
        lowrank__mode="full",
        parallel__engine=engine,
        parallel__deepspeed="{zero_optimization: {stage3_param_persistence_threshold: 0}}",
        train__steps=2,
        schedule__warmup_steps=0,
    )
    # A thread of gloo frees buffers unseen, so that more is counted than there is: 0.32 to 0.68 of the model.
    measured = [pool.run("cost_checks:memory_of_saving", config, world_size=4) for _ in range(3)]
    for process in zip(*measured, strict=True):
        assert process[0].share < 0.27 * process[0].model
        assert process[0].largest < 0.06 * process[0].model
        for most in (min(each.saving for each in process), min(each.restoring for each in process)):
            assert most < 0.6 * process[0].model, process


MODES = {f"layer {index}": 96 for index in range(6)} | {"small": 5, "large": 130}


def bucket_bound(modes: dict[str, int], rows: int, bucket_bytes: int) -> int:
    """Memory of ``measure_spectra`` beside the Grams that it keeps: four times a bucket (or the largest layer's
    triangles); for one layer at a time four times its triangles (indices, the solver's matrices) and its rows in
    float64."""
    triangles = [8 * R * (R + 1) for R in modes.values()]
    bucket = min(max(bucket_bytes, max(triangles)), sum(triangles))
    return 4 * bucket + 4 * max(triangles) + 8 * 2 * rows * max(modes.values())


@pytest.mark.parametrize("rows", [10, 400])
def test_buckets_bound_the_memory_of_a_measurement(rows: int) -> None:
    """Without them, the Grams of a model of many layers would be there four times over in every process."""
    factors = random_factors(MODES, rows)
    triangles = {name: 8 * R * (R + 1) for name, R in MODES.items()}
    whole = measure(factors, ALONE, sum(triangles.values()))
    assert whole.collectives == []
    calls: list[int] = []
    # One process of eight that owns few layers, with an all-reduce that has nothing to add.
    one = type(ALONE)(7, 8, lambda tensor: calls.append(tensor.nbytes))
    peaks = []
    for size in (sum(triangles.values()), 2 * 8 * 96 * 97, 1):
        calls.clear()
        measured = measure(factors, one, size)
        assert measured.peak <= bucket_bound(MODES, rows, size)
        peaks.append(measured.peak)
        sent = calls[: len(calls) // 2]  # it is measured twice
        assert sum(sent) == sum(triangles.values()) + 8 * sum(MODES.values())
        assert max(sent[:-1]) <= max(size, *triangles.values())
        assert measure(factors, ALONE, size).sigma == whole.sigma
    assert peaks == sorted(peaks, reverse=True)
    assert len(sent) == len(MODES) + 1


def test_buckets_change_no_bit_of_a_spectrum(pool: Pool) -> None:
    rows, most = 101, sum(8 * R * (R + 1) for R in MODES.values())
    sizes = [most, 2 * 8 * 96 * 97, 1]
    results = pool.run("cost_checks:measured_in_buckets", MODES, rows, sizes, world_size=2)
    for result in results:
        assert [len(all_reduces(measured.collectives)) for measured in result] == [2, 5, len(MODES) + 1]
        for measured, size in zip(result, sizes, strict=True):
            assert measured.sigma == results[0][0].sigma
            assert sum(all_reduces(measured.collectives)) == most + 8 * sum(MODES.values())
            assert measured.peak <= bucket_bound(MODES, 51, size)


class Compilations:
    """Counts the graphs that a run compiles, by what it was doing; hitting dynamo's limit, after which a block would
    silently run uncompiled, is an error."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.counts: list[tuple[str, bool, int]] = []
        self.tables: list[set[Any]] = [self.layouts()]
        train_step, evaluate, after_step = trainer._update, trainer._evaluate, trainer.ranks.after_step
        self.first = {"train": True, "eval": True}

        def counted(kind: str, work: Any, *arguments: Any) -> Any:
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            answer = work(*arguments)
            after = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            self.counts.append((kind, self.first[kind], after - before))
            self.first[kind] = False
            return answer

        def event(*arguments: Any) -> Any:
            before = trainer.engine.module
            records = after_step(*arguments)
            if trainer.engine.module is not before:
                self.tables.append(self.layouts())
                self.first = {"train": True, "eval": True}
            return records

        trainer._update = lambda *batch: counted("train", train_step, *batch)  # type: ignore[method-assign]
        trainer._evaluate = lambda: counted("eval", evaluate)  # type: ignore[method-assign]
        trainer.ranks.after_step = event  # type: ignore[method-assign]

    def layouts(self) -> set[Any]:
        """The distinct layouts of blocks in the present rank table."""
        blocks: dict[str, list[Any]] = {}
        for name, layer in self.trainer.engine.layout.items():
            _, block, part = name.split(".", 2)
            blocks.setdefault(block, []).append((part, layer.modes, layer.base))
        return {tuple(block) for block in blocks.values()}

    def check(self) -> None:
        """Each distinct layout, and the loss, compiles at most once a table for training and once for evaluation, and
        only in the first step (or evaluation) after its event."""
        for kind in ("train", "eval"):
            at_first = [count for each, first, count in self.counts if each == kind and first]
            assert len(at_first) == len(self.tables), kind
            for count, table in zip(at_first, self.tables, strict=True):
                assert count <= len(table) + 1, kind
            assert sum(at_first) >= len(set().union(*self.tables)), f"{kind}: not everything was compiled"
            assert not any(count for each, first, count in self.counts if each == kind and not first), kind


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        yield
    torch.compiler.reset()


COMPILED: dict[str, Any] = SHORT | {
    "parallel__engine": "local",
    "train__compile": "true",
    "train__steps": 6,
    "eval__interval": 1,
    "eval__batches": 1,
}
"""Three rank tables: at the start, after step 2, after step 4."""


@pytest.fixture
def graphs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo counts as ever; only what it does with a graph is left out, which would take seconds each."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda block, dynamic, **_: compile_(block, backend="eager", dynamic=dynamic)
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("base", [nightly("none"), nightly("decay"), slow("decay, graphs only")])
def test_compilations_are_bounded_by_the_rank_tables(
    request: pytest.FixtureRequest, dynamo: None, corpus: Path, base: str
) -> None:
    """A rank that dynamo took for a changing number, or a base that fades, would compile again and again."""
    base, _, only = base.partition(", ")
    if only:
        request.getfixturevalue("graphs_only")
    watched: list[Compilations] = []
    config = small_config(corpus, **COMPILED, lowrank__base=base, lowrank__targets=r"['blocks\.0\.mlp','blocks\.1\.']")
    train(config, hook=lambda trainer: watched.append(Compilations(trainer)))
    watched[0].check()
    assert [len(table) for table in watched[0].tables] == [2, 2, 2]


@pytest.mark.slow
def test_many_distinct_blocks_stay_compiled(dynamo: None, graphs_only: None, corpus: Path) -> None:
    """In training and evaluation more graphs than dynamo makes of one piece of code by default (8): beyond its limit it
    would run the rest of the training uncompiled."""
    watched: list[Compilations] = []
    parts = ["mlp", "attention", r"mlp\.up", r"attention\.q", r"(mlp|attention)\."]
    targets = ",".join(rf"'blocks\.{index}\.{part}'" for index, part in enumerate(parts))
    config = small_config(corpus, **COMPILED, model__num_layers=len(parts), lowrank__targets=f"[{targets}]")
    train(config, hook=lambda trainer: watched.append(Compilations(trainer)))
    watched[0].check()
    assert [len(table) for table in watched[0].tables] == [5, 5, 5]


@pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory from /proc")
@pytest.mark.parametrize(
    "engine",
    [slow("fsdp"), slow("ddp"), *(nightly(f"zero{stage}") for stage in range(4))],
)
def test_twenty_reshapes_leave_no_memory_behind(pool: Pool, corpus: Path, engine: str) -> None:
    """Hooks, buckets and graphs of a model that was let go can keep all of it; a leak of 20 models would be 150 MB."""
    config = small_config(
        corpus,
        model__hidden_size=192,
        lowrank__mode="fixed",
        lowrank__base="none",
        lowrank__initial_rank=4,
        parallel__engine=engine,
        train__steps=26,
        train__micro_batch_size=2,
    )
    for sizes in pool.run("cost_checks:reshaped_at_every_step", config, 4, world_size=2):
        assert len(sizes) == 11
        # A leak grows at every reshape. One small tensor more or less that Python happens to know of does not.
        tensors, resident = zip(*sizes, strict=True)
        assert min(tensors[-3:]) <= 1.001 * max(tensors[:3])
        assert min(resident[-3:]) <= 1.02 * max(resident[:3])
