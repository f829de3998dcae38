"""Hundreds of processes that exist in name only: what one of them would hold of a 1.3B model, before and after events.

The `fake` process group has any size and sends nothing, so shards that are small, uneven or empty are real here.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from runs import SMALL
from sharing import nightly, slow
from torch.testing._internal.distributed.fake_pg import FakeStore

from inrank_dist.config import Config, load_config
from inrank_dist.engine.engine import Engine
from inrank_dist.lowrank.convert import LayerLayout, Layout
from inrank_dist.lowrank.event import RankEvent, grow
from inrank_dist.lowrank.init import generator_for
from inrank_dist.method.initial import layer_shapes, start_layout
from inrank_dist.runtime.context import Context
from inrank_dist.train.building import build_engine, dense_skeleton

HIDDEN, MLP, LAYERS, VOCABULARY, RANK, BUFFER = 2048, 5504, 24, 32_000, 128, 32
SHAPES = dict.fromkeys(("attention.q", "attention.k", "attention.v", "attention.out"), (HIDDEN, HIDDEN))
SHAPES |= {"mlp.gate": (MLP, HIDDEN), "mlp.up": (MLP, HIDDEN), "mlp.down": (HIDDEN, MLP)}


def config() -> Config:
    settings = SMALL | {
        "model.name": "llama",
        "model.num_layers": LAYERS,
        "model.num_heads": 16,
        "model.hidden_size": HIDDEN,
        "model.intermediate_size": MLP,
        "model.max_seq_len": 64,
        "lowrank.initial_rank": RANK,
        "lowrank.buffer": BUFFER,
        "parallel.engine": "fsdp",
        "data.paths": "[none.txt]",
        "run.dir": "none",
    }
    return load_config(None, [f"--{key}={value}" for key, value in settings.items()])[0]


def expected_shapes(modes: int, base: bool) -> dict[str, tuple[int, ...]]:
    """Whole shape of every parameter, written down from the settings alone."""
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embed.weight": (VOCABULARY, HIDDEN),
        "head.weight": (VOCABULARY, HIDDEN),
        "final_norm.weight": (HIDDEN,),
    }
    for block in range(LAYERS):
        shapes |= {f"blocks.{block}.{norm}_norm.weight": (HIDDEN,) for norm in ("attention", "mlp")}
        for layer, (out_features, in_features) in SHAPES.items():
            name = f"blocks.{block}.{layer}"
            shapes |= {f"{name}.U": (out_features, modes), f"{name}.V": (in_features, modes)}
            if base:
                shapes[f"{name}.base"] = (out_features, in_features)
    return shapes


def check(engine: Engine, rank: int, world_size: int, modes: int, *, base: bool) -> int:
    """Every parameter and moment has ``ceil(rows / world_size)`` rows here, fewer or none at the end.

    Returns:
        Bytes of all of them in this process.
    """
    expected = expected_shapes(modes, base)
    tensors = engine.tensors()
    names = set(expected)
    for moment in ("exp_avg", "exp_avg_sq"):
        names |= {f"optimizer.{moment}.{name}" for name in expected if not name.endswith(".base")}
    assert set(tensors) == names
    held = 0
    for name, tensor in tensors.items():
        shape = expected[name.removeprefix("optimizer.exp_avg.").removeprefix("optimizer.exp_avg_sq.")]
        most = -(-shape[0] // world_size)
        rows = max(0, min(most, shape[0] - rank * most))
        assert tensor.shape == shape, name
        assert tensor.to_local().shape == (rows, *shape[1:]), name
        assert tensor.dtype == torch.float32
        held += tensor.to_local().nbytes
    share = {}
    for name, shape in expected.items():
        most = -(-shape[0] // world_size)
        copies = 1 if name.endswith(".base") else 3  # itself and two moments
        share[name] = copies * 4 * max(0, min(most, shape[0] - rank * most)) * torch.Size(shape[1:]).numel()
    assert held == sum(share.values())
    assert engine.parameter_count() == sum(torch.Size(shape).numel() for shape in expected.values())
    return held


@pytest.fixture
def pool() -> Iterator[Pool]:
    """A process of its own for each case: device meshes that differ only in this process's rank are equal, and DTensor
    keeps what it has worked out for one."""
    pool = Pool()
    yield pool
    pool.close()


@contextmanager
def one_process(rank: int, world_size: int) -> Iterator[Context]:
    """One process among many that do not exist."""
    environment = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": world_size, "MASTER_ADDR": "none", "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in environment.items()})
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    context = Context()
    context.device = torch.device("cpu")  # the fake group has no device of its own
    yield context
    context.stop()


# 5504 rows: 11 each over 512, 4 for process 500 and none from 501 on; 6 each over 1024, 2 for process 917.
FAST, SLOW, NIGHTLY = [(500, 512)], [(1023, 1024), (0, 512), (917, 1024)], [(511, 512), (0, 1024)]


@pytest.mark.parametrize(
    ("rank", "world_size"),
    [*FAST, *(slow(*case) for case in SLOW), *(nightly(*case) for case in NIGHTLY)],
    ids=[f"{rank} of {world_size}" for rank, world_size in FAST + SLOW + NIGHTLY],
)
def test_one_process_of_many_holds_its_share_through_growth_and_freeze(
    pool: Pool, capsys: pytest.CaptureFixture[str], rank: int, world_size: int
) -> None:
    """Every parameter and moment has its share of rows here, and nothing assumes that there are any: 5,504 over 1,024
    processes leave the last 106 without."""
    (report,) = pool.run("test_scale:through_growth_and_freeze", rank, world_size, world_size=1)
    with capsys.disabled():
        print(report, end="")


def through_growth_and_freeze(rank: int, world_size: int) -> str:
    with one_process(rank, world_size) as process:
        return checked(process)


def checked(process: Context) -> str:
    """Times and bytes, as text."""
    rank, world_size = process.rank, process.world_size
    settings = config()
    held, seconds = [], []
    R, F = RANK + BUFFER, BUFFER
    from_old, from_new = (torch.randn(rows, F, dtype=torch.float64) for rows in (R, F))
    grown = replace(grow(R, R + F), from_old=from_old, from_new=from_new, lengths=torch.ones(R, dtype=torch.float64))
    maps = torch.randn(2, R + F, RANK, dtype=torch.float64)

    began = time.perf_counter()
    skeleton = dense_skeleton(settings.model, VOCABULARY)
    layout = start_layout(layer_shapes(skeleton, settings.lowrank), settings.lowrank)
    engine = build_engine(settings, process, skeleton, layout, None)
    engine.restore(100, lambda tensors: None)
    seconds.append(time.perf_counter() - began)
    held.append(check(engine, rank, world_size, R, base=True))

    began = time.perf_counter()
    reshape(engine, LayerLayout(RANK + F, R + F, base=True), grown)
    seconds.append(time.perf_counter() - began)
    held.append(check(engine, rank, world_size, R + F, base=True))
    # From factors of zeros, the fresh columns are this process's rows of the random directions.
    layer = f"blocks.{LAYERS - 1}.mlp.down"
    fresh = directions(layer)[slice(*engine.placement(layer).rows(MLP))].double() @ from_new
    torch.testing.assert_close(engine.held_rows([layer])[layer].V[:, R:], fresh.float())

    began = time.perf_counter()
    reshape(engine, LayerLayout(RANK, RANK, base=False), RankEvent(maps[0], maps[1]))
    seconds.append(time.perf_counter() - began)
    held.append(check(engine, rank, world_size, RANK, base=False))

    parts = zip(("build", "growth", "freeze"), seconds, held, strict=True)
    return f"\nprocess {rank} of {world_size}:" + "".join(
        f"  {name} {time_:.1f} s, {size / 1e6:.2f} MB" for name, time_, size in parts
    )


def reshape(engine: Engine, layer: LayerLayout, event: RankEvent) -> None:
    """Every layer to the same layout, by the same maps."""
    layout: Layout = dict.fromkeys(engine.layout, layer)
    engine.reshape(layout, dict.fromkeys(layout, event), directions)


def directions(layer: str) -> torch.Tensor:
    in_features = SHAPES[layer.split(".", 2)[2]][1]
    return torch.randn(in_features, BUFFER, generator=generator_for(0, layer))
