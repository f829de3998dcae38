"""Settings whose values are the names in a registry."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class OneOf:
    """Marks a text setting, ``Annotated[str, OneOf(names)]``.

    Attributes:
        names: gives the names that are registered now.
    """

    names: Callable[[], Iterable[str]]
