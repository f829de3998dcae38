"""The trainer: ``build`` makes a run from settings, as the command ``train`` does."""

from typing import Any

__all__ = ["build"]


def __getattr__(name: str) -> Any:
    if name == "build":  # the settings of this package are read by those who train nothing
        from .session import build

        return build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
