"""Callback that records the spectra of dense layers or of their cumulative updates."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..lowrank.criterion import effective_rank, stable_rank
from ..lowrank.init import generator_for
from ..lowrank.spectrum import dense_singular_values
from ..lowrank.updates import recorded_spectrum
from ..method.dense import dense_spectra
from ..models.values import InitialValues
from .callbacks import Callback
from .health import Verdict

if TYPE_CHECKING:
    from .loop import Trainer


class SpectrumTracker(Callback):
    """Writes a record of dense layers every ``interval`` steps and after the last one.

    For each layer it has the effective and the stable rank, those of a Gaussian matrix of the same shape
    (``null_...``), and singular values with their indices. The kind of the record is ``updates`` for ``W(t) - W(0)``
    and ``weights`` for ``W(t)``.

    Args:
        interval: optimizer steps between measurements.
        shapes: layer -> ``(out, in)``. Layers are measured while they are dense.
        initial: initial values of the dense model, to measure updates. They are drawn again at each measurement. None:
            the weights are measured.
        seed: seed of the Gaussian matrices.
    """

    def __init__(
        self, interval: int, shapes: Mapping[str, tuple[int, int]], initial: InitialValues | None, seed: int
    ) -> None:
        self._interval, self._shapes, self._initial, self._seed = interval, shapes, initial, seed
        self._nulls: dict[tuple[int, int], tuple[float, float]] = {}

    def on_start(self, trainer: "Trainer") -> None:
        if not trainer.step and not self._initial:
            self._measure(trainer)  # the update is zero

    def on_step_end(self, trainer: "Trainer", verdict: Verdict, rate: float, records: list[dict[str, Any]]) -> None:
        if trainer.step % self._interval == 0 or trainer.step == trainer.config.train.steps:
            self._measure(trainer)

    def _measure(self, trainer: "Trainer") -> None:
        engine = trainer.engine
        shapes = {name: shape for name, shape in self._shapes.items() if name not in engine.layout}
        if not shapes:
            return
        began = time.perf_counter()
        values = self._initial

        def initial(name: str) -> Tensor:
            assert values
            return values.parameter(f"{name}.weight").reshape(shapes[name])

        spectra = dense_spectra(engine, shapes, initial if values else None)
        if trainer.context.rank:
            return  # process 0 alone writes records
        layers = {name: self._entry(sigma, shapes[name]) for name, sigma in spectra.items()}
        kind, seconds = "updates" if values else "weights", time.perf_counter() - began
        trainer.monitors.write({"kind": kind, "step": trainer.step, "layers": layers, "seconds": seconds})

    def _entry(self, sigma: Tensor, shape: tuple[int, int]) -> dict[str, Any]:
        effective, stable = self._null(shape)
        return {
            "shape": list(shape),
            "effective_rank": effective_rank(sigma),
            "null_effective_rank": effective,
            "stable_rank": stable_rank(sigma),
            "null_stable_rank": stable,
            **recorded_spectrum(sigma),
        }

    def _null(self, shape: tuple[int, int]) -> tuple[float, float]:
        """Return the effective and the stable rank of a Gaussian matrix of this shape or its transpose."""
        key = (min(shape), max(shape))
        if key not in self._nulls:
            generator = generator_for(self._seed, "null update", *key)
            sigma = dense_singular_values(torch.randn(key, generator=generator, dtype=torch.float64))
            self._nulls[key] = effective_rank(sigma), stable_rank(sigma)
        return self._nulls[key]
