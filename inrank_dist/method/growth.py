"""Initialisation of new modes after a growth (setting ``lowrank.growth_init``)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..lowrank.init import generator_for, start_factors
from .directions import Gradients, aim_at_gradient
from .holder import FactorHolder
from .initial import StartValues
from .settings import LowRankSettings


@dataclass(frozen=True)
class Growth:
    """A growth whose new modes are to be initialised.

    Attributes:
        holder: holds the factors after the growth.
        values: initial values of the parameters.
        settings: section ``lowrank``.
        seed: seed of the run.
        fresh: layer -> number of new modes, which are the last columns. ``U`` is zero there, and ``V`` has random
            orthonormal columns.
        step: number of completed optimizer steps.
        gradients: computes the gradients of all factors on the batch of that step. None if they are not finite.
    """

    holder: FactorHolder
    values: StartValues
    settings: LowRankSettings
    seed: int
    fresh: Mapping[str, int]
    step: int
    gradients: Gradients | None


def look_along_gradient(growth: Growth) -> None:
    """Initialise new modes along the top singular directions of the gradient, if it is finite."""
    if growth.gradients is not None:
        aim_at_gradient(growth.holder, growth.fresh, growth.gradients)


def open_as_published(growth: Growth) -> None:
    """Initialise both factors of new modes randomly, like the factors at the start. This changes the function.

    The published code of arXiv 2306.11250 grows in this way.
    """
    for name, count in growth.fresh.items():
        generator = generator_for(growth.seed, name, "published growth", growth.step)
        shape, std = growth.values.shapes[name], growth.values.std(name)
        whole = start_factors(*shape, count, growth.settings.init, std, generator)
        held = growth.holder.placement(name)
        U, V = (rows[slice(*held.rows(len(rows)))].to(growth.holder.device) for rows in (whole.U, whole.V))
        growth.holder.set_columns(name, growth.holder.layout[name].modes - count, U, V)


GROWTHS: dict[str, Callable[[Growth], None]] = {
    "random": lambda growth: None,
    "gradient": look_along_gradient,
    "published": open_as_published,
}
