"""Callbacks of the trainer."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..lowrank.init import generator_for
from .health import Verdict
from .sampling import NotFinite, sample_tokens

if TYPE_CHECKING:
    from .loop import Trainer

log = logging.getLogger("inrank_dist")


class Callback:
    """Base class of callbacks. Every process calls the same hooks.

    Attributes:
        name: key of the callback's state in checkpoints. Empty if it has no state.
    """

    name = ""

    def on_start(self, trainer: "Trainer") -> None:
        """Called before the first step of this process."""

    def on_step_end(self, trainer: "Trainer", verdict: Verdict, rate: float, records: list[dict[str, Any]]) -> None:
        """Called after an optimizer step and its rank event.

        Args:
            trainer: the trainer.
            verdict: verdict on the step.
            rate: learning rate of the step.
            records: records of the rank event. Empty if none was due.
        """

    def on_end(self, trainer: "Trainer") -> None:
        """Called after the last step and before the last checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in checkpoints, which must be JSON-serializable."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint."""


class Sample(Callback):
    """Callback that writes a text sample at the end of training."""

    def on_end(self, trainer: "Trainer") -> None:
        config, tokenizer = trainer.config, trainer.data.tokenizer
        if not config.eval.sample_tokens:
            return
        trainer.engine.model.eval()
        try:
            tokens = sample_tokens(
                trainer.engine.logits,
                [tokenizer.eos_id],
                count=config.eval.sample_tokens,
                max_seq_len=config.model.max_seq_len,
                generator=generator_for(config.run.seed, "sample", trainer.step),
                vocab_size=tokenizer.vocab_size,
                pad=config.train.compile,
            )
        except NotFinite as error:  # in every process; the weights are finite, so the run still saves them
            log.warning("warning: no sample: %s", error)
            return
        text = tokenizer.decode(tokens)
        trainer.monitors.write({"kind": "sample", "step": trainer.step, "prompt": "", "text": text})
