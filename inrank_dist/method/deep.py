"""Checks of the settings of deep layers."""

import math
from typing import TYPE_CHECKING

from ..runtime.errors import UserError

if TYPE_CHECKING:
    from .settings import LowRankSettings


def check_depth(settings: "LowRankSettings") -> None:
    """Raise ``UserError`` if the settings of deep layers are invalid, or if others do not go with them."""
    if settings.depth < 2:
        raise UserError(f"lowrank.depth is {settings.depth}; write 2, or more for layers with cores between U and V")
    if not 0 < settings.init_scale < math.inf:
        raise UserError(f"lowrank.init_scale is {settings.init_scale}; write a number above 0, such as 0.1")
    if not 0 <= settings.outer_lr_scale < math.inf:
        raise UserError(f"lowrank.outer_lr_scale is {settings.outer_lr_scale}; write 0 or a positive number, such as 1")
    if settings.depth == 2:
        return
    wrong: list[tuple[str, str, str, str]] = []
    deep, instead = f"lowrank.depth is {settings.depth}", "or lowrank.depth: 2"
    wrong += [(deep, "activation", "none", instead), (deep, "dense_fraction", "0", instead)]
    if settings.base == "none" and settings.init == "kaiming":
        wrong.append((deep, "init", "orthogonal", instead))
    if settings.grows and settings.growth_init == "published":
        wrong.append((deep, "growth_init", "random", instead))
    if settings.freezes and settings.has_budget:  # the budget counts parameters of U and V
        wrong.append((deep, "final", "per_layer", instead))
    if settings.outer_init == "gradient":
        by_gradient, instead = "lowrank.outer_init is gradient", "or lowrank.outer_init: random"
        wrong += [(by_gradient, "mode", "fixed", instead), (by_gradient, "base", "frozen", instead)]
    if settings.outer_lr_scale == 0:
        wrong.append(("lowrank.outer_lr_scale is 0", "mode", "fixed", "or a positive lowrank.outer_lr_scale"))
    for fact, name, value, otherwise in wrong:
        if str(getattr(settings, name)) not in (value, f"{value}.0"):
            raise UserError(
                f"{fact} but lowrank.{name} is {getattr(settings, name)}; write lowrank.{name}: {value}, {otherwise}"
            )
