"""Distributed training with incremental low-rank learning (InRank, arXiv 2306.11250).

The library adds low-rank layers to your own model and training loop::

    import inrank_dist as inrank

    run = inrank.LowRankRun(make_model, inrank.InRank(["mlp"], freeze_step=1000), make_optimizer)

Public names are imported on first use, so ``import inrank_dist`` is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hub.factors import load as load
    from .library import DeepLoRA as DeepLoRA
    from .library import FixedRank as FixedRank
    from .library import InRank as InRank
    from .library import LowRankRun as LowRankRun
    from .library import PretrainThenFactorise as PretrainThenFactorise
    from .library import Published as Published
    from .library.accelerated import AcceleratedRun as AcceleratedRun
    from .library.trainer import InRankCallback as InRankCallback
    from .lowrank.convert import LayerLayout as LayerLayout
    from .lowrank.convert import convert as convert
    from .lowrank.convert import find_targets as find_targets
    from .lowrank.kinds import register_layer_kind as register_layer_kind
    from .lowrank.layer import LayerKind as LayerKind
    from .lowrank.layer import LowRankLayer as LowRankLayer
    from .lowrank.merge import merge as merge
    from .method.settings import LowRankSettings as LowRankSettings
    from .models.plan import ModelPlan as ModelPlan
    from .runtime.errors import UserError as UserError

__version__ = "0.1.0"

_PLACES = {
    "DeepLoRA": "library",
    "FixedRank": "library",
    "InRank": "library",
    "LowRankRun": "library",
    "PretrainThenFactorise": "library",
    "Published": "library",
    "AcceleratedRun": "library.accelerated",
    "InRankCallback": "library.trainer",
    "LayerKind": "lowrank.layer",
    "LayerLayout": "lowrank.convert",
    "LowRankLayer": "lowrank.layer",
    "LowRankSettings": "method.settings",
    "convert": "lowrank.convert",
    "find_targets": "lowrank.convert",
    "register_layer_kind": "lowrank.kinds",
    "load": "hub.factors",
    "merge": "lowrank.merge",
    "ModelPlan": "models.plan",
    "UserError": "runtime.errors",
}

__all__ = ["__version__", *sorted(_PLACES)]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
