"""The trainer. ``build`` creates a run from its configuration, as the command ``train`` does."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callbacks import Callback as Callback
    from .session import build as build

__all__ = ["Callback", "build"]


def __getattr__(name: str) -> Any:
    # Imported on first use, because config.py imports the settings of this package without training anything.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = {"Callback": ".callbacks", "build": ".session"}[name]
    return getattr(importlib.import_module(place, __name__), name)
