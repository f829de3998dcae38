"""Floating-point operations of a run."""

from ..engine.engine import Engine
from ..lowrank.convert import Layout, convert
from ..models import LanguageModel, flops_per_token


class FlopCounter:
    """Counter of the forward and backward operations of all processes.

    Args:
        engine: engine of the model, whose shapes may change during training.
        seq_len: sequence length in tokens.
        before: operations counted before the checkpoint that the run resumes from. None if the number is unknown.

    Attributes:
        since_start: operations since the start of this process.
        dense_per_token: operations per token of the dense model.
    """

    def __init__(self, engine: Engine, seq_len: int, before: int | None = 0) -> None:
        self._engine, self._seq_len, self._before = engine, seq_len, before
        self._counted: tuple[Layout, int] = ({}, 0)
        self.since_start = 0
        self.dense_per_token = flops_per_token(engine.skeleton, seq_len)

    def count(self, tokens: int) -> None:
        """Count a step with the current model.

        Args:
            tokens: tokens of the global batch.
        """
        layout, flops = self._counted
        if layout is not self._engine.layout:
            flops = flops_per_token(self.unsharded, self._seq_len)
            self._counted = (self._engine.layout, flops)
        self.since_start += tokens * flops

    @property
    def unsharded(self) -> LanguageModel:
        """An unsharded copy of the current model on ``meta``."""
        return convert(self._engine.skeleton, self._engine.layout)

    @property
    def of_run(self) -> int | None:
        """Operations of the whole run so far, or None if unknown."""
        return None if self._before is None else self._before + self.since_start
