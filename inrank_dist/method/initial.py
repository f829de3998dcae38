"""Which layers are factored, and their values before training."""

import functools
import math

from torch import Tensor, nn

from ..lowrank.allocation import least_fraction
from ..lowrank.convert import LayerLayout, Layout, find_targets
from ..lowrank.init import generator_for, start_base, start_factors
from ..lowrank.kinds import matrix_shape
from ..lowrank.spectrum import Factors
from ..models.values import InitialValues
from ..runtime.errors import UserError
from .settings import LowRankSettings


def layer_shapes(skeleton: nn.Module, settings: LowRankSettings) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of the layers that are factored, in the model's order.

    Raises:
        UserError: a target that matches nothing, an initial rank above the width, or a budget that nothing fits into.
    """
    if settings.mode == "full":
        return {}
    try:
        targets = find_targets(skeleton, settings.targets)
    except ValueError as error:
        raise UserError(f"lowrank.targets: {error}") from None
    shapes = {name: matrix_shape(layer) for name, layer in targets.items()}
    for name, shape in shapes.items():
        limit = settings.rule.cap(min(shape)) if settings.grows else min(shape)
        if settings.initial_rank > limit:
            reason = f"min(in, out) of {name} is {min(shape)}"
            if settings.grows:
                reason += f" and lowrank.max_rank_fraction {settings.max_rank_fraction} caps its rank at {limit}"
            raise UserError(f"lowrank.initial_rank is {settings.initial_rank} but {reason}; write at most {limit}")
    if settings.freezes and settings.has_budget and settings.final_budget < least_fraction(shapes):
        least = math.ceil(1e4 * least_fraction(shapes)) / 1e4
        raise UserError(
            f"lowrank.final_budget is {settings.final_budget:g} but rank 1 in every factored layer already takes "
            f"{least_fraction(shapes):.2g} of their dense parameters; write at least {least:g}"
        )
    return shapes


def start_layout(shapes: dict[str, tuple[int, int]], settings: LowRankSettings) -> Layout:
    """The layout before the first step; without layers where they are dense then."""
    return {} if settings.dense_fraction else factored_layout(shapes, settings)


def fits(layout: Layout, shapes: dict[str, tuple[int, int]], settings: LowRankSettings) -> bool:
    """Whether a checkpoint's layout has the layers of the settings, or none while they are still dense."""
    return layout.keys() == shapes.keys() or (settings.dense_fraction > 0 and not layout)


def factored_layout(shapes: dict[str, tuple[int, int]], settings: LowRankSettings) -> Layout:
    """The layout with ``initial_rank`` in every layer."""
    return {
        name: LayerLayout(
            rank=settings.initial_rank,
            modes=settings.rule.modes(settings.initial_rank, min(shape)),
            base=settings.base != "none",
        )
        for name, shape in shapes.items()
    }


class StartValues:
    """Start value of every parameter, by name; the same in every process, drawn from the seed and the name alone.

    Dense parameters follow the model's own rules. They are drawn the same way whatever the mode, so that a full-rank
    and a low-rank run with one seed share all that they have in common.
    """

    def __init__(
        self, dense: InitialValues, shapes: dict[str, tuple[int, int]], settings: LowRankSettings, seed: int
    ) -> None:
        self.dense, self.shapes, self.settings, self.seed = dense, shapes, settings, seed
        # U and V of a layer come from one draw and are asked for one after the other.
        self.factors = functools.lru_cache(maxsize=1)(self._factors)

    def __call__(self, name: str) -> Tensor:
        """The whole value of a parameter of the converted model, float32 on CPU."""
        layer, _, leaf = name.rpartition(".")
        if leaf == "base" and layer in self.shapes:
            generator = generator_for(self.seed, layer, "base")
            return start_base(*self.shapes[layer], self.settings.init, self.std(layer), generator)
        if leaf in ("U", "V") and layer in self.shapes:
            return getattr(self.factors(layer), leaf)
        return self.dense.parameter(name)

    def _factors(self, layer: str) -> Factors:
        """Both factors of a layer at initialisation."""
        out_features, in_features = self.shapes[layer]
        modes = self.settings.rule.modes(self.settings.initial_rank, min(out_features, in_features))
        init = self.settings.init if self.settings.base == "none" else None
        generator = generator_for(self.seed, layer, "factors")
        return start_factors(out_features, in_features, modes, init, self.std(layer), generator)

    def std(self, layer: str) -> float:
        """Standard deviation with which the model starts the dense weight of a layer."""
        return self.dense.std(f"{layer}.weight")
