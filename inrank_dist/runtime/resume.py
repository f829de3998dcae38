"""Which settings may change when a run is resumed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OnResume:
    """What a section says of its settings, by name; ``*`` is all of them. The rest may change if the user allows it.

    Attributes:
        free: change a run by rounding at most; a resumed run takes them as they are now.
        fixed: weights, moments, tokens or the order of samples depend on them, so nothing of a checkpoint would fit.
    """

    free: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()

    def is_free(self, name: str) -> bool:
        """Whether a setting may simply change."""
        return name in self.free or "*" in self.free

    def is_fixed(self, name: str) -> bool:
        """Whether a setting cannot change."""
        return not self.is_free(name) and (name in self.fixed or "*" in self.fixed)
