"""The stable ranks of dense layers, and when they have settled (Cuttlefish, Wang et al., arXiv 2305.02538)."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

from ..lowrank.criterion import stable_rank
from ..runtime.errors import UserError
from .dense import dense_spectra
from .holder import FactorHolder

Shape = tuple[int, int]


class StableRanks:
    """Follows the stable ranks ``|W|_F^2 / |W|_2^2`` of dense layers from the initialisation on.

    The scaled stable rank of a layer is ``min(out, in) * s(t) / s(0)``, where ``s(t)`` is its stable rank: that of the
    initialisation counts as full rank. A layer has settled once the scaled stable rank, as a fraction of full rank, has
    changed by at most ``tolerance`` per measurement, on average over the last ``window`` measurements. It then stays
    settled.

    The published code compares the change of the stable rank itself, and has two rules more that the paper does not:
    the last few layers may change by more, and a rank is at least a fifth of the full rank.

    Args:
        shapes: layer -> ``(out, in)``.
        tolerance: largest mean change per measurement.
        window: number of changes in the mean.

    Attributes:
        start: layer -> stable rank at initialisation. Empty before the first measurement.
        last: layer -> the last measurements, at most ``window + 1``, the oldest first.
        settled: names of the settled layers.
    """

    def __init__(self, shapes: Mapping[str, Shape], tolerance: float, window: int) -> None:
        self.shapes, self.tolerance, self.window = shapes, tolerance, window
        self.start: dict[str, float] = {}
        self.last: dict[str, list[float]] = {}
        self.settled: set[str] = set()

    def measure(self, holder: FactorHolder, step: int) -> None:
        """Measure all layers. All processes must call it, and all get the same answer.

        Args:
            holder: holds the dense weights.
            step: number of completed optimizer steps.

        Raises:
            UserError: a weight is not finite, or zero at initialisation.
            Disagreement: processes have different stable ranks.
        """
        spectra = dense_spectra(holder, self.shapes)
        found = {name: stable_rank(sigma) for name, sigma in spectra.items()}
        for name, sigma in spectra.items():
            if not sigma.isfinite().all():
                raise UserError(f"at step {step} the weight of {name} is not finite; write a lower optimizer.lr")
            if not self.start and not found[name]:
                raise UserError(
                    f"the weight of {name} starts at zero, so it has no stable rank; write lowrank.dense_until: "
                    "fraction, or lowrank.targets without it"
                )
        self.add(found)
        answers = {name: [value.hex() for value in [self.start[name], *last]] for name, last in self.last.items()}
        holder.processes.agree("the stable ranks", answers)

    def add(self, found: Mapping[str, float]) -> None:
        """Record a measurement. The first one is that of the initialisation."""
        self.start = self.start or dict(found)
        for name, value in found.items():
            self.last[name] = [*self.last.get(name, []), value][-self.window - 1 :]
            change = self.change(name)
            if len(self.last[name]) > self.window and change is not None and change <= self.tolerance:
                self.settled.add(name)

    @property
    def all_settled(self) -> bool:
        return len(self.settled) == len(self.shapes)

    def scaled(self, layer: str) -> float:
        """Return the scaled stable rank of a layer."""
        return min(self.shapes[layer]) * self.last[layer][-1] / self.start[layer]

    def rank(self, layer: str) -> int:
        """Return the scaled stable rank of a layer, rounded up, at most ``min(out, in)``."""
        return min(math.ceil(self.scaled(layer) - 1e-9), min(self.shapes[layer]))

    def change(self, layer: str) -> float | None:
        """Return the mean change per measurement as a fraction of full rank. None after one measurement."""
        last = self.last[layer]
        changes = [abs(now - before) for before, now in itertools.pairwise(last)]
        return sum(changes) / len(changes) / self.start[layer] if changes else None

    def record(self, step: int, seconds: float) -> dict[str, Any]:
        """Return the record of the last measurement."""
        layers = {
            name: {
                "stable_rank": last[-1],
                "scaled_stable_rank": self.scaled(name),
                "change": self.change(name),
                "settled": name in self.settled,
            }
            for name, last in self.last.items()
        }
        return {
            "kind": "stable_ranks",
            "step": step,
            "seconds": seconds,
            "tolerance": self.tolerance,
            "layers": layers,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-serialisable values."""
        return {"start": self.start, "last": self.last, "settled": sorted(self.settled)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.start, self.settled = dict(state["start"]), set(state["settled"])
        self.last = {name: list(values) for name, values in state["last"].items()}
