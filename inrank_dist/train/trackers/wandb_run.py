"""Weights & Biases."""

import os
from collections.abc import Mapping
from html import escape
from typing import ClassVar

from .tracker import Description, Tracker


class WandbRun(Tracker):
    """A run in Weights & Biases.

    The step is that of the optimizer. Without ``WANDB_DIR`` files are in ``trackers/wandb`` of the run folder. In
    offline mode a resumed run is one more folder there with the same id, which ``wandb sync`` uploads after the first.
    """

    package = "wandb"
    environment: ClassVar[Mapping[str, str]] = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}

    def __init__(self, run: Description, id: str | None) -> None:
        import wandb

        self._html = wandb.Html
        self._run = wandb.init(
            project=run.project or os.environ.get("WANDB_PROJECT") or "inrank",
            name=os.environ.get("WANDB_NAME") or run.name,
            dir=os.environ.get("WANDB_DIR") or run.folder,
            id=id,
            resume="allow",
            config=run.config,
            allow_val_change=True,
            # Processor and memory are shown of the training, not of this process.
            settings=wandb.Settings(console="off", x_stats_pid=os.getppid()),
        )
        self.id = self._run.id

    def log(self, step: int, scalars: Mapping[str, float], texts: Mapping[str, str]) -> None:
        pages = {tag: self._html(f"<pre>{escape(text)}</pre>") for tag, text in texts.items()}
        self._run.log({**scalars, **pages}, step=step)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
