"""One rank decision, compared with the method of the published code.

Our method is what training does at a decision: compute the spectra of all layers from their Gram matrices, then apply
the rule. The published code (arXiv 2306.11250) forms the float32 ``in x out`` product of each layer's factors, computes
its singular values with ``torch.linalg.svdvals``, and applies the rule, in every process. Both spectra are passed to
the same rule here, so only the computation of the spectrum differs.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from ..lowrank.criterion import Decision, RankRule
from ..lowrank.division import Processes
from ..lowrank.init import generator_for
from ..lowrank.spectrum import Factors, measure_spectra
from ..runtime.context import Context
from ..runtime.progress import counted
from ..train.memory import peak_extra_bytes

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class ModelShape:
    """A model's shape as seen by a decision. The two MLP matrices of every block are factorised, as published."""

    name: str
    blocks: int
    hidden: int

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Layer -> ``(out, in)``, two layers per block."""
        wide = 4 * self.hidden
        return {
            f"blocks.{block}.mlp.{part}": shape
            for block in range(self.blocks)
            for part, shape in (("up", (wide, self.hidden)), ("down", (self.hidden, wide)))
        }


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("small", 12, 768),
        ModelShape("medium", 24, 1024),
        ModelShape("large", 36, 1280),
        ModelShape("1.3b", 24, 2048),
    )
}
"""GPT-2 small, medium and large, and the 1.3B shape of GPT-3 (24 blocks of width 2048)."""


@dataclass(frozen=True)
class Workload:
    """What to decide and how often to measure it.

    Attributes:
        rank: active rank ``r`` of every layer before the decision.
        buffer: ``b``; every layer has ``r + b`` modes.
        repeats: number of rounds; each runs our method, then the dense one.
        dense_layers: number of layers to measure the dense method on, as whole blocks spread evenly; None: all.
    """

    rank: int
    buffer: int
    repeats: int
    dense_layers: int | None

    @property
    def rule(self) -> RankRule:
        """The published rule."""
        return RankRule(threshold=0.9, criterion="variance", buffer=self.buffer, max_rank_fraction=0.5, multiple_of=1)


@dataclass(frozen=True)
class Result:
    """Measurements of one shape. Seconds are per round; bytes are peaks beyond the factors themselves.

    Attributes:
        modes: ``R`` of every layer.
        ours_seconds: for the whole model, one value per round.
        dense_seconds: layer -> one value per round, for the measured layers.
        ours_bytes_layer, ours_bytes: for a decision on a single layer, and on the whole model.
        dense_bytes: for one layer, and also for the whole model, since it processes one layer at a time.
        ours, dense: layer -> active rank after the decision.
    """

    shape: ModelShape
    modes: int
    ours_seconds: list[float]
    dense_seconds: dict[str, list[float]]
    ours_bytes_layer: int
    ours_bytes: int
    dense_bytes: int
    ours: dict[str, int]
    dense: dict[str, int]

    @property
    def extrapolated(self) -> bool:
        """Whether the dense method's time for the whole model is extrapolated from a sample of layers."""
        return len(self.dense) < len(self.ours)

    @property
    def dense_whole(self) -> list[float]:
        """Seconds of the dense method for the whole model, one value per round."""
        scale = len(self.ours) / len(self.dense)
        return [sum(seconds) * scale for seconds in zip(*self.dense_seconds.values(), strict=True)]

    @property
    def share(self) -> float:
        """Our time divided by the dense method's, for the whole model; medians."""
        return statistics.median(self.ours_seconds) / statistics.median(self.dense_whole)

    @property
    def different(self) -> dict[str, tuple[int, int]]:
        """Layers on which the two methods chose different ranks: (ours, dense)."""
        return {name: (self.ours[name], rank) for name, rank in self.dense.items() if rank != self.ours[name]}


def measure_decision(shape: ModelShape, workload: Workload, context: Context) -> Result | None:
    """Measure one shape on this machine.

    Our method runs in all processes, each on its rows of the factors. The dense one runs in process 0 on the whole
    factors while the others wait (in the published code they would do the same work at the same time).

    Returns:
        The result on process 0, None on the others.
    """
    layers = shape.layers
    modes = workload.rule.modes(workload.rank, shape.hidden)
    factors = {
        name: _factors(name, out, in_, modes, (0.5 + 2 * index / len(layers)) * modes, context.device)
        for index, (name, (out, in_)) in enumerate(layers.items())
    }
    rows = {name: _rows(whole, context) for name, whole in factors.items()}
    sample = sample_layers(list(layers), workload.dense_layers)

    def ours(names: Iterable[str]) -> dict[str, int]:
        spectra = measure_spectra(
            {name: rows[name] for name in names}, Processes(context.rank, context.world_size, context.sum)
        )
        decisions = {
            name: workload.rule.decide(sigma, workload.rank, min(layers[name])) for name, sigma in spectra.sigma.items()
        }
        context.agree("the ranks", {name: [spectra.checksums[name], d.after] for name, d in decisions.items()})
        return {name: decision.after for name, decision in decisions.items()}

    def dense(name: str) -> int:
        return published_decision(factors[name], workload.rule, workload.rank).after

    pair = sample[:2]
    for first in pair:  # warm up both methods
        ours([first])
        if context.is_main:
            dense(first)
    ours_bytes_layer = max(peak_extra_bytes(partial(ours, [name]), context.device) for name in pair)
    ours_bytes = peak_extra_bytes(partial(ours, layers), context.device)
    dense_bytes = 0
    if context.is_main:
        dense_bytes = max(peak_extra_bytes(partial(dense, name), context.device) for name in pair)
    ours_seconds: list[float] = []
    dense_seconds: dict[str, list[float]] = {name: [] for name in sample}
    ours_ranks: dict[str, int] = {}
    dense_ranks: dict[str, int] = {}
    for _ in counted(range(workload.repeats), shape.name, unit="rounds", enabled=context.is_main):
        context.barrier()
        seconds, ours_ranks = _timed(partial(ours, layers))
        ours_seconds.append(seconds)
        for name in sample if context.is_main else []:
            seconds, dense_ranks[name] = _timed(partial(dense, name))
            dense_seconds[name].append(seconds)
    context.barrier()
    if not context.is_main:
        return None
    return Result(
        shape, modes, ours_seconds, dense_seconds, ours_bytes_layer, ours_bytes, dense_bytes, ours_ranks, dense_ranks
    )


def published_decision(factors: Factors, rule: RankRule, rank: int) -> Decision:
    """The published method for one layer: singular values of the dense float32 ``in x out`` product, then the rule."""
    product = factors.V @ factors.U.T
    sigma = torch.linalg.svdvals(product)
    return rule.decide(sigma.double().cpu(), rank, min(product.shape))


def sample_layers(layers: list[str], count: int | None) -> list[str]:
    """Choose ``count`` layers (an even number; None: all) as whole blocks of two, spread evenly over the model."""
    blocks = len(layers) // 2
    chosen = blocks if count is None else min(count // 2, blocks)
    starts = [2 * (index * blocks // chosen) for index in range(chosen)]
    return [layers[start + part] for start in starts for part in (0, 1)]


def _factors(name: str, out: int, in_: int, modes: int, falloff: float, device: torch.device) -> Factors:
    """Random Gaussian factors in float32 whose product has approximately the singular values ``exp(-i / falloff)``.

    The same in every process. The falloff differs between layers, so that the rule raises most ranks by different
    amounts and leaves a few unchanged.
    """
    generator = generator_for(0, "bench decision", name)
    root = torch.exp(-torch.arange(modes) / (2 * falloff))
    U, V = (torch.randn(rows, modes, generator=generator) * (root / rows**0.5) for rows in (out, in_))
    return Factors(U.to(device), V.to(device))


def _rows(factors: Factors, context: Context) -> Factors:
    U, V = (factor.tensor_split(context.world_size)[context.rank] for factor in (factors.U, factors.V))
    return Factors(U, V)


def _timed(work: Callable[[], Returned]) -> tuple[float, Returned]:
    """Seconds until ``work`` returns. Its result is on the host, so a GPU has finished as well."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result
