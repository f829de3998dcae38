"""MLflow."""

import os
import time
from collections.abc import Mapping
from typing import ClassVar

from ...runtime.yaml_text import shown
from .tracker import Description, Tracker

LONGEST = 6000
"""Characters that MLflow keeps of a parameter."""
AT_ONCE = 100
"""Parameters that MLflow takes in a batch; of metrics it takes 1000."""


class MlflowRun(Tracker):
    """A run in the store that ``MLFLOW_TRACKING_URI`` names, else in MLflow's default store.

    Settings are parameters, by dotted name. MLflow does not change parameters: those that a resumed run changes are
    tags. Texts are artifacts.
    """

    package = "mlflow"
    environment: ClassVar[Mapping[str, str]] = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}

    def __init__(self, run: Description, id: str | None) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._client, self._metric = MlflowClient(), Metric
        settings = {
            f"{section}.{key}": str(shown(value))[:LONGEST]
            for section, keys in run.config.items()
            for key, value in keys.items()
        }
        known: dict[str, str] = {}
        changed: dict[str, str] = {}
        if id is not None:
            try:
                data = self._client.get_run(id).data
                known, changed = data.params, data.tags
                self._client.update_run(id, status="RUNNING")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                id = None
        if id is None:
            project = run.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "inrank"
            experiment = self._client.get_experiment_by_name(project)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project)
            id = self._client.create_run(experiment_id, run_name=run.name).info.run_id
        self.id = id
        new = [Param(key, value) for key, value in settings.items() if key not in known]
        for start in range(0, len(new), AT_ONCE):
            self._client.log_batch(id, params=new[start : start + AT_ONCE])
        for key, value in settings.items():
            if changed.get(key, known.get(key, value)) != value:
                self._client.set_tag(id, key, value)

    def log(self, step: int, scalars: Mapping[str, float], texts: Mapping[str, str]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(tag, value, now, step) for tag, value in scalars.items()]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self.id, metrics=metrics[start : start + 1000])
        for tag, text in texts.items():
            self._client.log_text(self.id, text, f"{tag}/step-{step:08d}.md")

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.id, status="FINISHED" if finished else "KILLED")
