"""Aim."""

import os
from collections.abc import Mapping

from .tracker import Description, Tracker


class AimRun(Tracker):
    """A run in the repository that ``AIM_REPO`` names (a folder, or ``aim://HOST:PORT``), else in Aim's default one."""

    package = "aim"

    def __init__(self, run: Description, id: str | None) -> None:
        from aim import Run, Text
        from aim.sdk.errors import MissingRunError

        self._text = Text
        where = {
            "repo": os.environ.get("AIM_REPO"),
            # These would be of this process, not of the training.
            "system_tracking_interval": None,
            "log_system_params": False,
            "capture_terminal_logs": False,
        }
        try:
            # The run folder's lock is ours, so Aim's lock on the run is that of a job that was killed.
            self._run = Run(run_hash=id, force_resume=id is not None, **where)
        except MissingRunError:
            self._run = Run(**where)
        self.id = self._run.hash
        self._run.name = run.name
        self._run.experiment = run.project or "inrank"
        self._run["config"] = run.config

    def log(self, step: int, scalars: Mapping[str, float], texts: Mapping[str, str]) -> None:
        for tag, value in scalars.items():
            self._run.track(value, name=tag, step=step)
        for tag, text in texts.items():
            self._run.track(self._text(text), name=tag, step=step)

    def close(self, finished: bool) -> None:
        self._run.close()
