"""What happens beside the training itself: hooks that see a run."""

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
    """Sees a run at its start, after each optimizer step and at its end; all processes call it alike.

    Attributes:
        name: under which its state is saved in checkpoints; empty: it has none.
    """

    name = ""

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step of this process."""

    def on_step_end(self, trainer: "Trainer", verdict: Verdict, rate: float, records: list[dict[str, Any]]) -> None:
        """After an optimizer step and its rank event.

        Args:
            verdict: what was found of the step.
            rate: its learning rate.
            records: of the rank event, none where nothing was due.
        """

    def on_end(self, trainer: "Trainer") -> None:
        """After the last step, before the last checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state, from which ``load_state_dict`` continues."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state in a checkpoint."""


class Sample(Callback):
    """Writes a sample of text at the end."""

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
                pad=config.train.compile,
            )
        except NotFinite as error:  # in every process; the weights are, so they are saved
            log.warning("warning: no sample: %s", error)
            return
        text = tokenizer.decode(tokens)
        trainer.monitors.write({"kind": "sample", "step": trainer.step, "prompt": "", "text": text})
