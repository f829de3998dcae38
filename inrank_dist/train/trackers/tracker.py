"""What an experiment tracker must offer, and the state of a run in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ...runtime.files import write_atomically
from ...runtime.json_file import read_json

LARGEST_STATE = 1 << 20


@dataclass(frozen=True)
class Description:
    """Describes a run to a tracker.

    Attributes:
        folder: where the tracker may put files of this run.
        name: name of the run.
        project: project or experiment. None: that of the tracker's own environment variable, else ``inrank``.
        config: all settings, section -> key -> value.
    """

    folder: Path
    name: str
    project: str | None
    config: dict[str, dict[str, Any]]


class Tracker:
    """A run in an experiment tracker. All of it happens in a process of its own.

    Its module must import the tracker's package in the constructor only, because the training imports the module. The
    class must be importable by its module and name.

    Attributes:
        package: name of the package.
        environment: environment variables of the tracker's process, unless the user has set them.
        id: by which the tracker knows the run.

    Args:
        run: the run.
        id: of the run in the tracker, which goes on. None, or a run that no longer exists: a new one is made.
    """

    package: ClassVar[str]
    environment: ClassVar[Mapping[str, str]] = {}
    id: str

    def __init__(self, run: Description, id: str | None) -> None:
        raise NotImplementedError

    def log(self, step: int, scalars: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Write numbers and Markdown texts of a step. Steps do not decrease."""
        raise NotImplementedError

    def close(self, finished: bool) -> None:
        """End the run, or leave it to be resumed if it is not ``finished``."""
        raise NotImplementedError


@dataclass
class State:
    """What is known of a run in a tracker, kept in the run folder as ``trackers/NAME.json``.

    Attributes:
        id: by which the tracker knows the run. None: not opened yet.
        sent: last step that was written, by kind of record.
        error: why the tracker's process has ended, or None.
    """

    id: str | None = None
    sent: dict[str, int] = field(default_factory=dict)
    error: str | None = None

    @classmethod
    def load(cls, path: Path) -> State:
        """Read the state. A file that is missing or damaged is a run that the tracker does not know."""
        try:
            saved = read_json(path, LARGEST_STATE)
            return cls(saved["id"], dict(saved["sent"]), saved["error"])
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def save(self, path: Path) -> None:
        """Write the state. A reader sees the old one or the new one."""
        write_atomically(path, json.dumps(asdict(self)).encode())


def state_path(run_folder: Path, name: str) -> Path:
    """Return the path of the state of a tracker. Its log lies beside it."""
    return run_folder / "trackers" / f"{name}.json"
