"""What workers of the pool count while the model changes: collectives, their bytes, allocated memory."""

import ctypes
import gc
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from runs import train, trainer_of
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.distributed.tensor import DTensor, Shard
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from inrank_dist.bench.traffic import Collectives, Counted
from inrank_dist.config import Config
from inrank_dist.engine.activations import micro_batch_activations
from inrank_dist.engine.cost import held_bytes, most_bytes, sent_bytes
from inrank_dist.engine.engine import Engine
from inrank_dist.engine.placement import chunk
from inrank_dist.lowrank.convert import convert
from inrank_dist.lowrank.division import Processes
from inrank_dist.lowrank.spectrum import Factors, measure_spectra
from inrank_dist.runtime.context import Context
from inrank_dist.train.building import cost_setup
from inrank_dist.train.loop import Trainer
from inrank_dist.train.memory import peak_extra_bytes


def all_seen() -> dict[str, list[Counted]]:
    """Each way to reach another process, and what ``Collectives`` saw of it."""
    context = Context()
    context.start(60)
    rank, count = context.rank, context.world_size
    ways: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(torch.ones(3)),
        "reduce": lambda: dist.reduce(torch.ones(3), 0),
        "broadcast": lambda: dist.broadcast(torch.ones(3), 0),
        "all_gather": lambda: dist.all_gather([torch.ones(3) for _ in range(count)], torch.ones(3)),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(torch.ones(3 * count), torch.ones(3)),
        "reduce_scatter": lambda: dist.reduce_scatter(torch.ones(3), [torch.ones(3) for _ in range(count)]),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(torch.ones(3), torch.ones(3 * count)),
        "gather": lambda: dist.gather(torch.ones(3), [torch.ones(3) for _ in range(count)] if rank == 0 else None),
        "scatter": lambda: dist.scatter(torch.ones(3), [torch.ones(3) for _ in range(count)] if rank == 0 else None),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.ones(count), torch.ones(count)),
        "send, recv": lambda: dist.send(torch.ones(3), 1) if rank == 0 else dist.recv(torch.ones(3), 0),
        "barrier": lambda: dist.barrier(),
        "all_gather_object": lambda: dist.all_gather_object([None] * count, "object"),
        "broadcast_object_list": lambda: dist.broadcast_object_list(["object"], 0),
        "functional all_reduce": lambda: functional.all_reduce(torch.ones(3), "sum", dist.group.WORLD).sum(),
        "functional all_gather": lambda: functional.all_gather_tensor(torch.ones(3), 0, dist.group.WORLD).sum(),
        "a DTensor in one piece": lambda: DTensor.from_local(torch.ones(3), mesh, [Shard(0)]).full_tensor(),
    }
    try:
        mesh = dist.init_device_mesh("cpu", (count,))
        seen = {}
        for name, way in ways.items():
            with warnings.catch_warnings(), Collectives() as collectives:
                warnings.simplefilter("ignore", FutureWarning)  # the newest torch has other names for some
                way()
            seen[name] = collectives.seen
        return seen
    finally:
        context.stop()


class Allocations:
    """What is allocated meanwhile, in bytes, from torch's profiler: every call of torch's allocator in this thread,
    those inside kernels as well. What a thread of gloo frees last (the buffer of a collective) is not seen."""

    def __enter__(self) -> "Allocations":
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        assert self._profile.profiler is not None and self._profile.profiler.kineto_results is not None
        events = self._profile.profiler.kineto_results.events()
        self._memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        self._regions = {e.name(): (e.start_ns(), e.start_ns() + e.duration_ns()) for e in events}

    def extra(self, region: str) -> tuple[int, int]:
        """Most bytes beyond those at the start of ``record_function(region)`` while it ran, and how many at its end."""
        start, end = self._regions[region]
        live = peak = 0
        for time, size in self._memory:
            if start <= time <= end:
                live += size
                peak = max(peak, live)
        return peak, live


@dataclass
class Event:
    """What one rank event cost.

    Attributes:
        modes: layer -> ``R`` before and after.
        collectives: of the event.
        step, next_step: collectives of the forward and backward passes before and after it.
    """

    action: str
    modes: dict[str, tuple[int, int]]
    collectives: list[Counted]
    step: list[Counted]
    next_step: list[Counted] = field(default_factory=list)


def collectives_of_events(config: Config) -> list[Event]:
    """Train, and count what travels at every event and in the training steps around it."""
    events: list[Event] = []

    def hook(trainer: Trainer) -> None:
        after_step, accumulate = trainer.ranks.after_step, trainer.engine.accumulate
        steps: list[list[Counted]] = []
        inside = False

        def counted_step(*arguments: Any, **options: Any) -> Tensor:
            if inside:
                return accumulate(*arguments, **options)
            with Collectives() as collectives:
                loss = accumulate(*arguments, **options)
            steps.append(collectives.seen)
            if events and not events[-1].next_step:
                events[-1].next_step = collectives.seen
            return loss

        def counted_event(step: int, *batch: Any) -> list[dict[str, Any]]:
            nonlocal inside
            action, before = trainer.ranks.due(step), trainer.engine.layout
            inside = True
            with Collectives() as collectives:
                records = after_step(step, *batch)
            inside = False
            if action is None:
                assert collectives.seen == []
                return records
            modes = {name: (before[name].modes, layer.modes) for name, layer in trainer.engine.layout.items()}
            events.append(Event(action, modes, collectives.seen, steps[-1]))
            return records

        trainer.engine.accumulate, trainer.ranks.after_step = counted_step, counted_event  # type: ignore

    train(config, hook=hook)
    return events


@dataclass
class Memory:
    """Bytes of one process around one event.

    Attributes:
        peak, change: most extra memory during the event, and what is left of it (less, where it is below zero).
        before, after: parameters and moments that this process holds, before and after the event.
        factors: those of the factors alone, before or after the event, whichever is more.
        grams: what the largest all-reduce of Grams carries.
        layer: three float64 copies of both whole factors of the largest layer.
    """

    action: str
    peak: int
    change: int
    before: int
    after: int
    factors: int
    grams: int
    layer: int


def memory_of_events(config: Config) -> list[Memory]:
    """Train, and count the memory that every event takes."""
    events: dict[int, Memory] = {}

    def hook(trainer: Trainer) -> None:
        after_step = trainer.ranks.after_step

        def counted(step: int, *batch: Any) -> list[dict[str, Any]]:
            engine, action = trainer.engine, trainer.ranks.due(step)
            if action is None:
                return after_step(step, *batch)
            (before, old), old_layout = _held(engine), engine.layout
            gc.collect()
            with record_function(f"event {step}"):
                records = after_step(step, *batch)
                gc.collect()
            after, new = _held(engine)
            modes = {name: max(layer.modes, old_layout[name].modes) for name, layer in engine.layout.items()}
            stacked = 2 if config.lowrank.base == "none" and config.lowrank.measure == "update" else 1
            measured = [stacked * layer.modes for layer in old_layout.values()]
            events[step] = Memory(
                action=action,
                peak=0,
                change=0,
                before=before,
                after=after,
                factors=max(old, new),
                grams=sum(8 * R * (R + 1) for R in measured),
                layer=3 * max(8 * sum(trainer.ranks.shapes[name]) * R for name, R in modes.items()),
            )
            return records

        trainer.ranks.after_step = counted  # type: ignore[method-assign]

    with Allocations() as allocations:
        train(config, hook=hook)
    for step, event in events.items():
        event.peak, event.change = allocations.extra(f"event {step}")
    return list(events.values())


def _held(engine: Engine) -> tuple[int, int]:
    """Bytes of this process's rows of all parameters and moments, and of those of the factors alone."""
    sizes = {
        name: tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes
        for name, tensor in engine.tensors().items()
    }
    return sum(sizes.values()), sum(size for name, size in sizes.items() if name.endswith((".U", ".V")))


@dataclass
class Measured:
    """One measurement of spectra.

    Attributes:
        sigma: layer -> its singular values.
        collectives: what travelled.
        peak: most extra memory beside the Grams that are kept.
    """

    sigma: dict[str, list[float]]
    collectives: list[Counted]
    peak: int


def measure(factors: Mapping[str, Factors], processes: Processes, bucket_bytes: int) -> Measured:
    """``measure_spectra`` with its costs; one run for the bytes, one for the memory."""
    with Collectives() as collectives:
        measure_spectra(factors, processes, bucket_bytes=bucket_bytes)
    # Under a dispatch mode torch computes singular vectors too, by another algorithm: the values are of this run.
    with Allocations() as allocations, record_function("measure"):
        spectra = measure_spectra(factors, processes, bucket_bytes=bucket_bytes)
    kept = sum(gram.nbytes for grams in spectra.grams.values() for gram in (grams.U, grams.V))
    sigma = {name: values.tolist() for name, values in spectra.sigma.items()}
    return Measured(sigma, collectives.seen, allocations.extra("measure")[0] - kept)


def random_factors(modes: Mapping[str, int], rows: int) -> dict[str, Factors]:
    """Factors with ``rows`` rows, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: Factors(torch.randn(rows, R, generator=generator), torch.randn(rows, R, generator=generator))
        for name, R in modes.items()
    }


def measured_in_buckets(modes: dict[str, int], rows: int, sizes: list[int]) -> list[Measured]:
    """``measure`` of the same factors for several sizes of a bucket, rows divided among the processes."""
    context = Context()
    context.start(60)
    try:
        cut = slice(*chunk(rows, context.rank, context.world_size))
        mine = {name: Factors(each.U[cut], each.V[cut]) for name, each in random_factors(modes, rows).items()}
        processes = Processes(context.rank, context.world_size, context.sum)
        return [measure(mine, processes, size) for size in sizes]
    finally:
        context.stop()


def reshaped_at_every_step(config: Config, warm_up: int) -> list[tuple[int, int]]:
    """Reshape before every step, wider and back, and see that every parameter moves in the step after.

    Returns:
        From ``warm_up`` steps on, whenever the model is as large as at the start: bytes of all tensors that Python
        knows of, and resident memory in bytes.
    """
    sizes: list[tuple[int, int]] = []

    def hook(trainer: Trainer) -> None:
        ranks, take_step = trainer.ranks, trainer.take_step
        narrow = dict(trainer.engine.layout)
        wide = {name: replace(layer, modes=layer.modes + 2) for name, layer in narrow.items()}

        def reshaped() -> Any:
            engine = trainer.engine
            if trainer.step:  # there are moments to carry over
                layout, action = (wide, "grow") if engine.layout == narrow else (narrow, "freeze")
                events = ranks._plan(layout, measure_spectra(engine.factors(), ranks.processes), action, trainer.step)  # type: ignore
                engine.reshape(layout, events, lambda name: ranks._directions(name, trainer.step, events[name].fresh))
                if trainer.step >= warm_up and layout == narrow:
                    sizes.append((_tensor_bytes(), _resident_bytes()))
            before = {name: _rows_of(tensor) for name, tensor in engine.tensors().items()}
            taken = take_step()
            after = {name: _rows_of(tensor) for name, tensor in engine.tensors().items()}
            still = [name for name, rows in before.items() if rows.numel() and torch.equal(after[name], rows)]
            assert not still, f"step {trainer.step}: {still} do not move"
            return taken

        trainer.take_step = reshaped  # type: ignore[method-assign]

    train(config, hook=hook)
    return sizes


def _rows_of(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _tensor_bytes() -> int:
    """Bytes of the storages of all tensors that are alive."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [each for each in gc.get_objects() if type(each) in (Tensor, torch.nn.Parameter)]
        tensors += [each.grad for each in tensors if each.is_leaf and type(each.grad) is Tensor]  # known to C++ alone
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def _resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Saving:
    """Bytes of one process around what a checkpoint takes and gives.

    Attributes:
        saving, restoring: most extra memory meanwhile.
        share: the rows of all parameters and moments that this process is charged with.
        model: all parameters and moments.
        largest: the largest of them, whole.
    """

    saving: int
    restoring: int
    share: int
    model: int
    largest: int


def memory_of_saving(config: Config) -> Saving:
    """Train a few steps, then save to memory and restore, and count."""
    found: list[Saving] = []

    def hook(trainer: Trainer) -> None:
        engine = trainer.engine

        def kept(*_: Any, **__: Any) -> None:
            """In place of the run's only checkpoint."""
            gc.collect()
            with Allocations() as allocations:
                with record_function("save"):
                    tensors = engine.tensors()
                with record_function("restore"):
                    engine.restore(engine.optimizer_steps, lambda target: None)
            share = sum(_rows_of(tensor).nbytes for tensor in tensors.values())
            sizes = [tensor.nbytes for tensor in tensors.values()]
            peaks = [allocations.extra(region)[0] for region in ("save", "restore")]
            found.append(Saving(*peaks, share, sum(sizes), max(sizes)))

        trainer.save = kept  # type: ignore[method-assign]

    train(config, hook=hook)
    return found[0]


def held_and_sent(config: Config, steps: int) -> tuple[int, int, float, float]:
    """Train, and count what one more step holds and sends.

    Returns:
        Bytes that go with the engine, in a step between backward pass and optimizer, and what the formula says of them;
        bytes that this process sends in a step, and what the formula says.
    """
    context = Context()
    context.start(60, always=True)
    try:
        trainer = trainer_of(config, context)
        for _ in range(steps):
            batches, _, _ = trainer.take_step()
            trainer.ranks.after_step(trainer.step, partial(trainer.engine.factor_gradients, batches, 1))
        engine, setup = trainer.engine, cost_setup(config, context.world_size)
        module = convert(engine.skeleton, engine.layout)
        trainer.take_step()  # ZeRO-3 takes note of what comes when after a rank event
        trainer.take_step()
        with Collectives() as collectives:
            trainer.take_step()
        batch = [(each.inputs, each.targets) for each in trainer.loader.next_batch()]
        engine.accumulate(batch, 1)
        engine.parameters()  # gives up what is still gathered
        with_engine = _tensor_bytes()
        engine.release()
        held = with_engine - _tensor_bytes()
        trainer.loader.close()
        return held, held_bytes(module, setup).total, collectives.sent, sent_bytes(module, setup)
    finally:
        context.stop()


def held_before_the_last_micro_batch(config: Config) -> tuple[int, int]:
    """Take a step, then accumulate two micro-batches.

    Returns:
        Bytes that go with the engine when the second one begins, and what the formula says of them.
    """
    context = Context()
    context.start(60, always=True)
    try:
        trainer = trainer_of(config, context)
        trainer.take_step()
        engine, setup = trainer.engine, cost_setup(config, context.world_size)
        assert setup.accumulation == 2
        module = convert(engine.skeleton, engine.layout)
        batch = [(each.inputs, each.targets) for each in trainer.loader.next_batch()]
        seen: list[int] = []

        def counted(*inputs: Tensor) -> Tensor:
            engine.parameters()  # gives up what is still gathered
            seen.append(_tensor_bytes())
            return type(engine).loss(engine, *inputs)

        engine.loss = counted  # type: ignore[method-assign]
        engine.accumulate(batch, 1)
        engine.release()
        trainer.loader.close()
        return seen[1] - _tensor_bytes(), held_bytes(module, setup).total
    finally:
        context.stop()


def peak_of_a_micro_batch(config: Config) -> tuple[int, float]:
    """Of forward and backward pass in this process: bytes beside weights and moments, and what the plan says."""
    context = Context()
    trainer = trainer_of(config, context)
    trainer.take_step()
    engine, setup = trainer.engine, cost_setup(config, 1)
    module = convert(engine.skeleton, engine.layout)
    activations = micro_batch_activations(
        module,
        config.train.micro_batch_size,
        config.model.max_seq_len,
        bf16=setup.bf16,
        checkpointing=config.train.activation_checkpointing,
        on_gpu=False,
    )
    batch = [(each.inputs, each.targets) for each in trainer.loader.next_batch()]
    measured = peak_extra_bytes(lambda: engine.accumulate(batch, 1), context.device)
    trainer.loader.close()
    held = held_bytes(module, setup)
    return measured, most_bytes(module, setup, activations) - held.parameters - held.moments


def collectives_of_a_step(config: Config) -> list[Counted]:
    """Of the third optimizer step."""
    context = Context()
    context.start(60, always=True)
    try:
        trainer = trainer_of(config, context)
        for _ in range(3):
            with Collectives() as collectives:
                trainer.take_step()
        trainer.loader.close()
        return collectives.seen
    finally:
        context.stop()


class Operations(TorchDispatchMode):
    """Counts calls of these operations of ATen."""

    def __init__(self, *counted: Any) -> None:
        super().__init__()
        self.counted, self.count = counted, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in self.counted
        return func(*args, **(kwargs or {}))


def fetched_in_a_step(config: Config) -> int:
    """Numbers that an optimizer step, between two rank decisions, takes out of tensors."""
    trainer = trainer_of(config, Context())
    for _ in range(2):
        with Operations(torch.ops.aten._local_scalar_dense) as fetches:
            trainer.take_step()
            trainer.ranks.after_step(trainer.step, None)
    trainer.loader.close()
    return fetches.count
