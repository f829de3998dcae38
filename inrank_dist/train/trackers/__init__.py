"""Experiment trackers that a run can also be written to: Weights & Biases, MLflow and Aim.

``metrics.jsonl`` stays the record of the run. Each tracker has a process of its own that follows this file
(``follow``), so that neither a slow network nor an error, a lock or a signal handler of a tracker reaches the training.
``RunTrackers`` starts and ends these processes.
"""

from importlib.util import find_spec

from ...runtime.errors import UserError
from .aim_run import AimRun
from .mlflow_run import MlflowRun
from .tracker import Tracker
from .wandb_run import WandbRun

__all__ = ["TRACKERS", "Tracker", "check_installed"]

TRACKERS: dict[str, type[Tracker]] = {"wandb": WandbRun, "mlflow": MlflowRun, "aim": AimRun}
"""Trackers by the name in ``log.trackers``."""


def check_installed(names: list[str]) -> None:
    """Check that the packages of these trackers are installed, without importing them.

    Raises:
        UserError: one is not.
    """
    for name in names:
        package = TRACKERS[name].package
        spec = find_spec(package)
        # A folder of that name in the working directory, such as Weights & Biases leaves there, has no origin.
        if spec is None or spec.origin is None:
            raise UserError(
                f"log.trackers has {name}, but the package {package} is not installed; pip install {package}, or write "
                "log.trackers without it"
            )
