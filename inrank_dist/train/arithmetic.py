"""Floating-point operations of a run."""

from ..engine.engine import Engine
from ..lowrank.convert import Layout, convert
from ..models import LanguageModel, flops_per_token


class FlopCounter:
    """Counts forward and backward operations over all processes.

    Args:
        engine: its model changes its shape.
        seq_len: tokens of a sequence.
        before: operations of the run that is continued; None: it began with a version that did not count them.

    Attributes:
        since_start: of all steps since the start of this process.
        dense_per_token: of the dense model.
    """

    def __init__(self, engine: Engine, seq_len: int, before: int | None = 0) -> None:
        self._engine, self._seq_len, self._before = engine, seq_len, before
        self._counted: tuple[Layout, int] = ({}, 0)
        self.since_start = 0
        self.dense_per_token = flops_per_token(engine.skeleton, seq_len)

    def count(self, tokens: int) -> None:
        """Add a step with the model as it is now."""
        layout, flops = self._counted
        if layout is not self._engine.layout:
            flops = flops_per_token(self.unsharded, self._seq_len)
            self._counted = (self._engine.layout, flops)
        self.since_start += tokens * flops

    @property
    def unsharded(self) -> LanguageModel:
        """The model as it is now, on ``meta``."""
        return convert(self._engine.skeleton, self._engine.layout)

    @property
    def of_run(self) -> int | None:
        """Of all steps so far; None: unknown."""
        return None if self._before is None else self._before + self.since_start
