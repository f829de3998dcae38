"""The loader gives one order of samples, whatever the number of processes, and goes on exactly where it was."""

import json
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from inrank_dist.data.loader import IGNORE_INDEX, Loader, LoaderState, MicroBatch, validation_batches
from inrank_dist.runtime.errors import UserError

BLOCK = 4


def rows(count: int) -> Dataset:
    """Row i holds i * 100, i * 100 + 1, ..., so that a token tells its row and place."""
    return Dataset.from_dict({"input_ids": [[i * 100 + t for t in range(BLOCK + 1)] for i in range(count)]})


def loader(count: int = 20, *, rank: int = 0, world_size: int = 1, **options: Any) -> Loader:
    settings: dict[str, Any] = {"global_batch_size": 12, "micro_batch_size": 1, "seed": 3, **options}
    data: Any = SimpleNamespace(train=rows(count), fingerprint="f")
    data.parts = (SimpleNamespace(data=data, share=1.0),)
    return Loader(data, rank=rank, world_size=world_size, **settings)


def ids(batches: list[MicroBatch]) -> list[int]:
    return [sample for batch in batches for sample in batch.sample_ids]


def global_order(steps: int, world_size: int, **options: Any) -> list[int]:
    """Sample ids of ``steps`` global batches, the processes' slices put side by side."""
    loaders = [loader(rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    return [sample for _ in range(steps) for one in loaders for sample in ids(one.next_batch())]


@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (1, 4), (2, 3), (3, 2), (4, 3), (4, 1), (12, 1)])
def test_the_order_does_not_depend_on_the_processes(world_size: int, micro: int) -> None:
    """Losses of 1 and of 4 processes can only agree if they see the same samples in the same batches."""
    assert global_order(7, world_size, micro_batch_size=micro) == global_order(7, 1)


def test_epochs_follow_each_other_without_a_gap() -> None:
    """12 does not divide 20, so batches span epochs; every epoch must still hold each sample once."""
    order = global_order(5, 1)
    epochs = [order[start : start + 20] for start in range(0, 60, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3, "each epoch has an order of its own"


def test_a_batch_larger_than_the_data() -> None:
    """A tiny corpus must not stop a large batch: one batch then holds several epochs."""
    order = global_order(1, 2, count=5)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))


def test_contents_and_shapes() -> None:
    """Targets are the inputs moved by one, of the row that sample_ids names."""
    batches = loader(micro_batch_size=3, rank=1, world_size=2).next_batch()
    assert len(batches) == 2
    for batch in batches:
        assert batch.inputs.shape == batch.targets.shape == (3, BLOCK)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        expected = torch.tensor(batch.sample_ids)[:, None] * 100 + torch.arange(BLOCK + 1)
        assert torch.equal(batch.inputs, expected[:, :-1])
        assert torch.equal(batch.targets, expected[:, 1:])


@pytest.mark.parametrize("before", range(5))
def test_resume_on_another_number_of_processes(before: int) -> None:
    """The state says where the job is, not where a process is; it must pass through JSON."""
    expected = global_order(8, 1)
    loaders = [loader(rank=rank, world_size=3, micro_batch_size=2) for rank in range(3)]
    for one in loaders:
        for _ in range(before):
            one.next_batch()
    states = [json.dumps(one.state().to_dict()) for one in loaders]
    assert len(set(states)) == 1
    state = LoaderState.from_dict(json.loads(states[0]))
    assert global_order(8 - before, 4, state=state) == expected[before * 12 :]


def test_resume_does_not_need_the_old_batch_size() -> None:
    """The stream of samples goes on even where its cut into batches changes."""
    one = loader()
    first = ids(one.next_batch())
    assert first + global_order(6, 2, state=one.state(), global_batch_size=8) == global_order(5, 1)


def test_order_depends_on_the_seed() -> None:
    """Runs of several seeds are only independent if their data order is too."""
    assert global_order(2, 1, seed=4) != global_order(2, 1)


def test_the_order_is_fixed_for_ever() -> None:
    """A checkpoint is resumed by a later version of this code, NumPy and torch: the order is part of the format."""
    assert global_order(1, 1) == [0, 4, 9, 7, 1, 16, 19, 10, 12, 5, 6, 11]


def test_global_random_state_is_left_alone() -> None:
    """A loader that drew from it would change dropout, and dropout would change the data."""

    def states() -> tuple:
        return (
            random.getstate(),
            np.random.get_state(legacy=False)["state"]["key"].tolist(),
            torch.get_rng_state().tolist(),
        )

    before = states()
    order = ids(loader().next_batch())
    assert states() == before
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert ids(loader().next_batch()) == order


@pytest.mark.parametrize(
    ("global_batch_size", "micro", "world_size", "advice"),
    [
        (30, 4, 4, "write 3 processes with train.micro_batch_size 2 .*, or train.global_batch_size 16 or 32$"),
        (12, 8, 4, "less than train.micro_batch_size 8 x .*; write train.micro_batch_size 3 .*_batch_size 32$"),
        (8, 3, 1, r"; write train.micro_batch_size 2 or 4 \(the same results\), or train.global_batch_size 6 or 9$"),
        (16, 8, 3, r"; write 2 processes \(the same results\), or train.global_batch_size 24$"),
        (64, 8, 128, "; write 64 processes with train.micro_batch_size 1 .*, or train.global_batch_size 1024$"),
        (3, 1, 4, r"write 3 processes \(the same results\), or train.global_batch_size 4$"),
        (0, 2, 1, "write train.global_batch_size 2$"),
    ],
)
def test_batch_sizes_that_do_not_fit(global_batch_size: int, micro: int, world_size: int, advice: str) -> None:
    """The message names the values that disagree and the nearest that work."""
    with pytest.raises(UserError, match=advice) as caught:
        loader(global_batch_size=global_batch_size, micro_batch_size=micro, world_size=world_size)
    for value in (f"global_batch_size is {global_batch_size}", f"micro_batch_size {micro}", f"processes {world_size}"):
        assert value in str(caught.value)
    assert "\n" not in str(caught.value)


def test_state_of_other_data_or_seed_is_refused() -> None:
    """Sample numbers mean nothing in another data set; a silent restart would repeat samples."""
    state = loader().state()
    with pytest.raises(UserError, match=r"data g.*the data is now f"):
        loader(state=LoaderState(state.seed, 0, 0, "g"))
    with pytest.raises(UserError, match=r"run.seed is 5, .* write run.seed: 3"):
        loader(seed=5, state=state)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("count", "most"), [(10, None), (10, 7), (10, 99), (1, None), (12, None)])
def test_validation_counts_each_token_once(world_size: int, batch_size: int, count: int, most: int | None) -> None:
    """Equal numbers of equal batches, or collectives hang; no row twice, or the mean is not the corpus's."""
    data = rows(count)
    shares = [
        list(validation_batches(data, batch_size=batch_size, rank=rank, world_size=world_size, max_sequences=most))
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    seen: list[int] = []
    for batch in (batch for share in shares for batch in share):
        assert batch.inputs.shape == batch.targets.shape == (batch_size, BLOCK)
        assert batch.inputs.min() >= 0, "rows that fill up still pass through the embedding"
        seen += batch.targets[batch.targets != IGNORE_INDEX].tolist()
        for sample, targets in zip(batch.sample_ids, batch.targets, strict=True):
            assert targets.eq(IGNORE_INDEX).all() if sample < 0 else targets[0] == sample * 100 + 1
    most = min(count, most or count)
    expected = [i * count // most for i in range(most)]  # spread evenly
    assert sorted(seen) == [i * 100 + t for i in expected for t in range(1, BLOCK + 1)]
