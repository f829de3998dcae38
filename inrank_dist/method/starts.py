"""What the settings of dense steps and of the initial ranks rule out, and when they have no effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..runtime.errors import UserError

if TYPE_CHECKING:
    from .settings import LowRankSettings


def finds_ranks(settings: LowRankSettings) -> bool:
    """Return whether the dense weights determine the ranks of mode fixed after the dense steps."""
    if settings.mode != "fixed" or not settings.dense_fraction or settings.initial_budget is not None:
        return False
    return settings.dense_until == "stable_rank" or settings.initial_energy is not None


def check(settings: LowRankSettings) -> None:
    """Raise UserError if the settings contradict each other. The mode is not ``full``."""
    start = f"lowrank.dense_fraction is {settings.dense_fraction}"
    if settings.dense_fraction and settings.base != "none":
        raise UserError(f"{start} but lowrank.base is {settings.base}; write lowrank.base: none")
    if settings.dense_fraction and settings.growth_init == "published":
        raise UserError(f"{start} but lowrank.growth_init is published; write lowrank.growth_init: random")
    if settings.dense_until == "stable_rank" and not settings.dense_fraction:
        raise UserError(
            "lowrank.dense_until is stable_rank but lowrank.dense_fraction is 0; write the fraction of the steps after "
            "which the layers are factored at the latest, such as 0.5"
        )
    if not settings.stable_rank_tolerance >= 0:
        raise UserError(
            f"lowrank.stable_rank_tolerance is {settings.stable_rank_tolerance}; write 0 or a positive number"
        )
    _check_ranks(settings)
    if settings.init != "loaded" or settings.dense_fraction:
        return
    if settings.base == "decay":
        raise UserError(
            "lowrank.init is loaded but lowrank.base is decay, which would scale the loaded weights to zero; write "
            "lowrank.base: frozen, or none"
        )
    if settings.base == "none" and settings.grows:
        raise UserError(
            f"lowrank.init is loaded but lowrank.mode {settings.mode} with base none would grow the rank of the loaded "
            "weights; write lowrank.base: frozen to grow an update, or lowrank.mode: fixed"
        )


def _check_ranks(settings: LowRankSettings) -> None:
    """Refuse what cannot determine the initial ranks."""
    energy, budget = settings.initial_energy, settings.initial_budget
    if energy is not None and budget is not None:
        raise UserError(
            f"lowrank.initial_energy is {energy} and lowrank.initial_budget is {budget}, and each determines the "
            "ranks; leave out one of them"
        )
    for name, value, example in (("initial_energy", energy, "0.95"), ("initial_budget", budget, "0.25")):
        if value is None:
            continue
        if not 0 < value <= 1:
            raise UserError(f"lowrank.{name} is {value}; write a share above 0 and at most 1, like {example}")
        needed = {"mode": "fixed"}
        if name == "initial_energy":
            needed = {"base": "none", "mode": "fixed"}
            needed = needed if settings.dense_fraction else {"init": "loaded", **needed}
        for key, only in needed.items():
            if getattr(settings, key) != only:
                raise UserError(
                    f"lowrank.{name} is {value} but lowrank.{key} is {getattr(settings, key)}; write lowrank.{key}: "
                    f"{only}, or leave out {name}"
                )
    if budget is not None and settings.depth > 2:  # it counts the parameters of U and V
        raise UserError(
            f"lowrank.initial_budget is {budget} but lowrank.depth is {settings.depth}; write lowrank.initial_rank, or "
            "lowrank.depth: 2"
        )
    if budget is not None and settings.init == "loaded" and settings.base == "none" and not settings.dense_fraction:
        raise UserError(
            f"lowrank.initial_budget is {budget} but lowrank.init is loaded; write lowrank.initial_energy, or "
            "lowrank.initial_rank"
        )


def without_effect(settings: LowRankSettings) -> list[tuple[str, str]]:
    """Return the settings that have no effect because of these, each with the reason. The mode is not ``full``."""
    idle: list[tuple[str, str]] = []
    if settings.initial_energy is not None:
        idle.append(("initial_rank", "lowrank.initial_energy finds the rank of each layer"))
    if settings.initial_budget is not None:
        idle.append(("initial_rank", "lowrank.initial_budget finds the rank of each layer"))
    if settings.dense_until != "stable_rank":
        idle += [(key, "lowrank.dense_until is fraction") for key in ("stable_rank_tolerance", "stable_rank_window")]
    if not settings.dense_fraction:
        idle.append(("factorized_lr_scale", "lowrank.dense_fraction is 0"))
        idle += [
            (key, "lowrank.dense_fraction is 0, so no target is ever dense")
            for key in ("track_updates", "track_weights")
        ]
        return idle
    idle.append(("init", "with lowrank.dense_fraction the factors come from the dense weights"))
    if settings.grows:
        idle.append(("measure", "with lowrank.dense_fraction the rule looks at the product"))
        idle.append(("initial_rank", "with lowrank.dense_fraction the rule finds the first rank as well"))
    elif finds_ranks(settings) and settings.initial_energy is None:
        idle.append(("initial_rank", "with lowrank.dense_until stable_rank the rank is the scaled stable rank"))
    return idle
