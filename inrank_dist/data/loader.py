"""Training batches in an order that does not depend on the number of processes and can be resumed at any step."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..runtime.errors import UserError
from ..runtime.words import divisors, nearest_divisors, plural
from .order import SampleOrder

if TYPE_CHECKING:  # takes seconds to import
    from datasets import Dataset

    from .prepared import Prepared

#: Target at positions that are not scored; the default ``ignore_index`` of ``torch.nn.functional.cross_entropy``.
IGNORE_INDEX = -100


@dataclass(frozen=True)
class MicroBatch:
    """Sequences for one forward and backward pass of one process: ``b`` sequences of ``T`` tokens.

    ``inputs`` and ``targets`` are int64 (b, T). ``targets[:, t]`` is the token after ``inputs[:, t]``, or
    ``IGNORE_INDEX`` throughout a padding row. ``sample_ids`` are the row numbers in the data set, -1 for padding rows.
    """

    inputs: Tensor
    targets: Tensor
    sample_ids: list[int]


@dataclass(frozen=True)
class LoaderState:
    """Position of a loader: the next sample is number ``sample_index`` in the order of epoch ``epoch``.

    An epoch has as many samples as the data, also in a mixture, some of whose sources are then used up more often. The
    state is the same on every process and independent of their number.
    """

    seed: int
    epoch: int
    sample_index: int
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """As a JSON-serializable dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LoaderState":
        """From the result of ``to_dict``."""
        return cls(**values)


class Loader:
    """Endless training batches for one of several processes.

    Samples are shuffled each epoch with a permutation derived from (seed, epoch). Sources of a mixture are interleaved
    by weight, see ``SampleOrder``. Epochs follow each other without a gap, so a batch may contain the end of one and
    the start of the next. Global batch k consists of the samples ``k * global_batch_size ...`` of that stream, of which
    process ``rank`` takes the ``rank``-th of ``world_size`` equal slices. The global random state is neither read nor
    changed.

    Args:
        data: the prepared data.
        global_batch_size: sequences per optimizer step, over all processes.
        micro_batch_size: sequences per forward pass of one process.
        state: where to resume; None starts at the beginning.

    Raises:
        UserError: the batch sizes do not fit the number of processes, or ``state`` belongs to other data or another
            seed.
    """

    def __init__(
        self,
        data: "Prepared",
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        state: LoaderState | None = None,
    ) -> None:
        check_batch_sizes(global_batch_size, micro_batch_size, world_size)
        if state is not None:
            _check_state(state, seed, data.fingerprint)
        self._dataset = data.train.with_format("numpy")
        self._samples = len(data.train)
        sizes, shares = [len(part.data.train) for part in data.parts], [part.share for part in data.parts]
        self._order = SampleOrder(sizes, shares, seed)
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._local_batch_size = global_batch_size // world_size
        self._rank = rank
        self._seed = seed
        self._fingerprint = data.fingerprint
        self._position = 0 if state is None else state.epoch * self._samples + state.sample_index

    def next_batch(self) -> list[MicroBatch]:
        """This process's slice of the next global batch: ``global_batch_size / world_size`` sequences."""
        first = self._position + self._rank * self._local_batch_size
        rows = self._order.rows(first, self._local_batch_size)
        self._position += self._global_batch_size
        tokens = torch.from_numpy(self._dataset[rows]["input_ids"].astype(np.int64, copy=False))
        return [
            MicroBatch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), ids.tolist())
            for part, ids in zip(
                tokens.split(self._micro_batch_size),
                np.split(rows, len(rows) // self._micro_batch_size),
                strict=True,
            )
        ]

    def state(self) -> LoaderState:
        """Position of the next batch."""
        epoch, sample_index = divmod(self._position, self._samples)
        return LoaderState(self._seed, epoch, sample_index, self._fingerprint)


def validation_batches(
    dataset: "Dataset", *, batch_size: int, rank: int, world_size: int, max_sequences: int | None
) -> Iterator[MicroBatch]:
    """Yield ``max_sequences`` rows spread evenly over ``dataset`` (None: all rows), each on exactly one process.

    The rows are spread because the first ones all come from the first documents and are not representative.

    Every process yields the same number of micro-batches of ``batch_size`` rows, so that their collectives match. In
    padding rows all targets are ``IGNORE_INDEX``. Which rows are used does not depend on ``world_size`` or
    ``batch_size``.
    """
    rows = dataset.with_format("numpy")
    count = len(dataset) if max_sequences is None else min(max_sequences, len(dataset))
    for first in range(rank * batch_size, _round_up(count, world_size * batch_size), world_size * batch_size):
        ids = np.arange(first, first + batch_size)
        real = ids < count
        ids = ids * len(dataset) // count
        tokens = torch.from_numpy(rows[np.where(real, ids, 0)]["input_ids"].astype(np.int64, copy=False))
        targets = tokens[:, 1:].masked_fill(torch.from_numpy(~real)[:, None], IGNORE_INDEX)
        yield MicroBatch(tokens[:, :-1].contiguous(), targets, np.where(real, ids, -1).tolist())


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def check_batch_sizes(global_batch_size: int, micro_batch_size: int, world_size: int) -> None:
    """Check that the processes divide the global batch into whole micro-batches.

    Raises:
        UserError: they do not. The advice begins with what leaves the results as they are: another micro-batch, then
            fewer processes.
    """
    multiple = micro_batch_size * world_size
    if global_batch_size > 0 and global_batch_size % multiple == 0:
        return
    below = global_batch_size // multiple * multiple
    sizes = f"{below} or {below + multiple}" if below > 0 else str(multiple)
    relation = "less than" if global_batch_size < multiple else "not a multiple of"
    raise UserError(
        f"train.global_batch_size is {global_batch_size}, {relation} train.micro_batch_size {micro_batch_size}"
        f" x number of processes {world_size}; write {_same_results(global_batch_size, micro_batch_size, world_size)}"
        f"train.global_batch_size {sizes}"
    )


def _same_results(global_batch_size: int, micro_batch_size: int, world_size: int) -> str:
    """What to write instead without a change of the global batch, as the beginning of a list; empty: nothing works."""
    if global_batch_size < 1:
        return ""
    processes = max(divisors(global_batch_size, world_size))
    share = global_batch_size // processes
    if processes == world_size:
        return f"train.micro_batch_size {nearest_divisors(share, micro_batch_size)} (the same results), or "
    micro = max(divisors(share, micro_batch_size))
    smaller = f" with train.micro_batch_size {micro}" if micro != micro_batch_size else ""
    return f"{plural(processes, 'process')}{smaller} (the same results), or "


def _check_state(state: LoaderState, seed: int, fingerprint: str) -> None:
    if state.fingerprint != fingerprint:
        raise UserError(
            f"the checkpoint is of data {state.fingerprint[:12]}, but the data is now {fingerprint[:12]} (text,"
            " tokenizer or model.max_seq_len changed); restore them, or start a new run in another run.dir"
        )
    if state.seed != seed:
        raise UserError(
            f"run.seed is {seed}, but the checkpoint's order of samples is that of seed {state.seed}"
            f"; write run.seed: {state.seed}, or start a new run in another run.dir"
        )
