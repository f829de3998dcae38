"""Selection of the layers to factor, and their initial layout and values."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..lowrank.allocation import least_fraction
from ..lowrank.convert import LayerLayout, Layout, find_targets
from ..lowrank.division import assign_owners
from ..lowrank.init import deepened, generator_for, start_base, start_factors
from ..lowrank.kinds import matrix_shape
from ..lowrank.layer import core_index, is_factor
from ..lowrank.spectrum import Factors
from ..lowrank.truncate import truncated_weight
from ..models.values import InitialValues
from ..runtime.context import Context
from ..runtime.errors import UserError
from ..runtime.progress import counted
from .settings import LowRankSettings
from .starts import finds_ranks


def layer_shapes(skeleton: nn.Module, settings: LowRankSettings) -> dict[str, tuple[int, int]]:
    """Return ``(out, in)`` of each layer to factor, in the order of the model; empty in mode ``full``.

    Raises:
        UserError: a target is invalid or matches no layer, a matched layer cannot be factored, ``initial_rank`` is too
            large for a layer, or ``final_budget`` is below rank 1 in every layer.
    """
    if settings.mode == "full":
        return {}
    shapes = target_shapes(skeleton, settings)
    if settings.initial_budget is not None:
        _check_budget(settings.initial_budget, shapes)
        return shapes
    for name, shape in ({} if finds_ranks(settings) else shapes).items():
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


def _check_budget(budget: float, shapes: dict[str, tuple[int, int]]) -> None:
    """Raise UserError if rank 1 of a layer exceeds ``initial_budget``."""
    for name, (out_features, in_features) in shapes.items():
        needed = (out_features + in_features) / (out_features * in_features)
        if budget < needed:
            least = math.ceil(1e4 * needed) / 1e4
            raise UserError(
                f"lowrank.initial_budget is {budget:g} but rank 1 of {name} already takes {needed:.2g} of its dense "
                f"parameters; write at least {least:g}, or lowrank.targets without it"
            )


def target_shapes(skeleton: nn.Module, settings: LowRankSettings) -> dict[str, tuple[int, int]]:
    """Return ``(out, in)`` of each target, in the order of the model, in any mode.

    Raises:
        UserError: a target is invalid or matches no layer, or a matched layer cannot be factored.
    """
    try:
        targets = find_targets(skeleton, settings.targets)
    except ValueError as error:
        raise UserError(f"lowrank.targets: {error}") from None
    return {name: matrix_shape(layer) for name, layer in targets.items()}


def start_layout(
    shapes: dict[str, tuple[int, int]], settings: LowRankSettings, ranks: Mapping[str, int] | None = None
) -> Layout:
    """Return the layout at initialisation; empty if the layers are dense at the start.

    ``U`` and ``V`` are trainable as long as ``RankController.start`` needs their gradients.
    """
    if settings.dense_fraction:
        return {}
    layout = factored_layout(shapes, settings, ranks)
    if settings.outer_init != "gradient":
        return layout
    return {name: dataclasses.replace(layer, fixed_outer=False) for name, layer in layout.items()}


def fits(layout: Layout, shapes: dict[str, tuple[int, int]], settings: LowRankSettings) -> bool:
    """Return whether the layout of a checkpoint has the layers of the settings, or none if they may still be dense."""
    return layout.keys() == shapes.keys() or (settings.dense_fraction > 0 and not layout)


def factored_layout(
    shapes: dict[str, tuple[int, int]], settings: LowRankSettings, ranks: Mapping[str, int] | None = None
) -> Layout:
    """Return the layout with low-rank layers.

    Args:
        ranks: layer -> rank. Default: the rank of the settings in every layer.
    """
    return {
        name: LayerLayout(
            rank,
            settings.rule.modes(rank, min(shape)),
            base=settings.base != "none",
            depth=settings.depth,
            fixed_outer=settings.depth > 2 and settings.outer_lr_scale == 0,
        )
        for name, shape in shapes.items()
        for rank in [settings.rank_of(shape) if ranks is None else ranks[name]]
    }


class StartValues:
    """Initial values of the parameters by name. They depend only on the seed and the name.

    Dense parameters are initialised by the rules of the model, independent of the mode. A full-rank and a low-rank run
    with the same seed therefore have equal initial values for all parameters that they have in common.

    Args:
        dense: initial values of the dense model.
        shapes: layer to factor -> ``(out, in)``.
        settings: section ``lowrank``.
        seed: seed of the run.

    Attributes:
        ranks: layer -> rank at the start, or None for that of the settings.
    """

    ranks: Mapping[str, int] | None = None

    def __init__(
        self, dense: InitialValues, shapes: dict[str, tuple[int, int]], settings: LowRankSettings, seed: int
    ) -> None:
        self.dense, self.shapes, self.settings, self.seed = dense, shapes, settings, seed
        self._context: Context | None = None
        self._owner: dict[str, int] = {}
        self._own: dict[str, Factors] = {}
        # One draw gives both U and V of a layer, which are requested one after the other.
        self.factors = functools.lru_cache(maxsize=1)(self._factors)

    def __call__(self, name: str) -> Tensor:
        """Return the whole initial value of a parameter of the converted model, float32 on the CPU."""
        layer, _, leaf = name.rpartition(".")
        if leaf == "base" and layer in self.shapes:
            if self.settings.init == "loaded":
                return self._loaded(layer)
            generator = generator_for(self.seed, layer, "base")
            return start_base(*self.shapes[layer], self.settings.init, self.std(layer), generator)
        if layer in self.shapes and is_factor(leaf):
            factors, index = self.factors(layer), core_index(leaf)
            return factors.cores[index - 1] if index else getattr(factors, leaf)
        return self.dense.parameter(name)

    def cut_loaded(self, context: Context) -> None:
        """Truncate the loaded weights that start as factors, each layer in one process of the job.

        The other processes get the factors when they ask for them. Then all must ask for the same layers in the same
        order. So all have the same bits even where their machines round differently. Until then a process holds the
        factors of its layers, about as much as its share of the model.

        With ``initial_energy`` this sets ``ranks``.

        Args:
            context: context with an initialised process group.

        Raises:
            UserError: on all processes, if a weight cannot be truncated.
        """
        settings = self.settings
        if settings.init != "loaded" or settings.base != "none" or settings.dense_fraction:
            return
        # An SVD takes a time proportional to out * in * min(out, in), and an owner is assigned by the cube of a size.
        sizes = {layer: round((math.prod(shape) * min(shape)) ** (1 / 3)) for layer, shape in self.shapes.items()}
        self._context, self._owner = context, assign_owners(sizes, context.world_size)
        own = [layer for layer, owner in self._owner.items() if owner == context.rank]
        self._own = context.on_all_ranks(lambda: self._truncate_all(own, enabled=context.is_main))
        if settings.initial_energy is not None:
            found = context.gather({layer: factors.U.shape[1] for layer, factors in self._own.items()})
            self.ranks = {layer: found[self._owner[layer]][layer] for layer in self.shapes}

    def _truncate_all(self, layers: list[str], *, enabled: bool) -> dict[str, Factors]:
        shown = counted(layers, "factoring the loaded weights", unit="layers", enabled=enabled)
        return {layer: self._truncated(layer) for layer in shown}

    def _factors(self, layer: str) -> Factors:
        """Return the factors of a layer."""
        init = self.settings.init if self.settings.base == "none" else None
        if init == "loaded":
            return self._cut(layer)
        generator, std = generator_for(self.seed, layer, "factors"), 0.0 if init is None else self.std(layer)
        return start_factors(
            *self.shapes[layer],
            self._modes(layer),
            init,
            std,
            generator,
            depth=self.settings.depth,
            scale=self.settings.init_scale,
            orthonormal_outer=self.settings.outer_init == "gradient",
        )

    def _modes(self, layer: str) -> int:
        rank = self.settings.rank_of(self.shapes[layer]) if self.ranks is None else self.ranks[layer]
        return self.settings.rule.modes(rank, min(self.shapes[layer]))

    def _cut(self, layer: str) -> Factors:
        """Return the factors of a loaded weight, from the process that has truncated it."""
        if self._context is None:
            return self._truncated(layer)
        owner, modes = self._owner[layer], self._modes(layer)
        sizes = [*self.shapes[layer], *[modes] * (self.settings.depth - 2)]
        if owner == self._context.rank:
            factors = self._own.pop(layer, None) or self._truncated(layer)
            joined = torch.cat((factors.U, factors.V, *factors.cores))
        else:
            joined = torch.empty(sum(sizes), modes)
        self._context.broadcast(joined, owner)
        U, V, *cores = joined.split(sizes)
        return Factors(U, V, tuple(cores))

    def _loaded(self, layer: str) -> Tensor:
        """Return the loaded weight of a layer as its matrix ``(out, in)``, float32."""
        return self.dense.parameter(f"{layer}.weight").reshape(self.shapes[layer])

    def _truncated(self, layer: str) -> Factors:
        """Return the float32 factors of the best approximation of a loaded weight."""
        energy = None if self.ranks is not None else self.settings.initial_energy
        rank = self._modes(layer) if energy is None else None
        try:
            best = truncated_weight(self._loaded(layer), rank=rank, energy=energy).factors
        except (ValueError, torch.linalg.LinAlgError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{layer} of the loaded model cannot be factored: {error}; write another folder") from None
        return deepened(Factors(best.U.float(), best.V.float()), self.settings.depth)

    def std(self, layer: str) -> float:
        """Return the standard deviation of the dense weight of a layer at initialisation."""
        return self.dense.std(f"{layer}.weight")
