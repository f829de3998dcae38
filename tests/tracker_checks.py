"""Trackers of the tests, and readers of what the real ones have written without a network."""

import json
import os
import signal
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from inrank_dist.train.trackers import Tracker
from inrank_dist.train.trackers.tracker import Description, state_path


class FileTracker(Tracker):
    """Writes all that it is told to ``told.jsonl`` beside its state."""

    package = "json"

    def __init__(self, run: Description, id: str | None) -> None:
        self._file = (run.folder / "told.jsonl").open("a")
        self.id = id or f"run-{os.getpid()}"
        self._tell(event="open", id=self.id, new=id is None, name=run.name, project=run.project, config=run.config)

    def log(self, step: int, scalars: Mapping[str, float], texts: Mapping[str, str]) -> None:
        self._tell(event="log", step=step, scalars=scalars, texts=texts)

    def close(self, finished: bool) -> None:
        self._tell(event="close", finished=finished)

    def _tell(self, **what: Any) -> None:
        self._file.write(json.dumps(what) + "\n")
        self._file.flush()


class Closed(FileTracker):
    """Cannot be opened."""

    def __init__(self, run: Description, id: str | None) -> None:
        raise ConnectionError("no server\nat that address")


class Failing(FileTracker):
    """Fails at step 2."""

    def log(self, step: int, scalars: Mapping[str, float], texts: Mapping[str, str]) -> None:
        if step == 2:
            raise ConnectionError("the network is away")
        super().log(step, scalars, texts)


class Killed(FileTracker):
    """Its process dies at step 2, as by a fault in compiled code."""

    def log(self, step: int, scalars: Mapping[str, float], texts: Mapping[str, str]) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


class Hanging(FileTracker):
    """Never closes, and has a helper process that does not end either."""

    def close(self, finished: bool) -> None:
        helper = os.fork()
        if helper:
            self._tell(event="hangs", process=os.getpid(), helper=helper)
        signal.pause()


class Environment(FileTracker):
    """Tells of its environment variables."""

    environment = {"TEST_TELEMETRY": "off", "TEST_MODE": "default"}  # noqa: RUF012

    def __init__(self, run: Description, id: str | None) -> None:
        super().__init__(run, id)
        self._tell(event="environment", **{key: os.environ[key] for key in self.environment})


def told(run: Path, event: str | None = None) -> list[dict[str, Any]]:
    """What a ``FileTracker`` was told."""
    every = [json.loads(line) for line in (run / "trackers/told.jsonl").read_text().splitlines()]
    return [each for each in every if event in (None, each["event"])]


class Found(NamedTuple):
    """What a tracker holds of a run.

    Attributes:
        scalars: tag -> (step, value), in the order in which they were written.
        texts: tag -> (step, text).
        settings: dotted setting -> value as text.
        status: of the run, where the tracker has one.
    """

    scalars: dict[str, list[tuple[int, float]]]
    texts: dict[str, list[tuple[int, str]]]
    settings: dict[str, str]
    status: str | None


def flat(config: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {f"{section}.{key}": str(value) for section, keys in config.items() for key, value in keys.items()}


def found_in_wandb(run: Path, id: str) -> Found:
    """From the offline files, each of which is one process's part of the run."""
    from wandb.proto.wandb_internal_pb2 import Record

    scalars: dict[str, list[tuple[int, float]]] = {}
    texts: dict[str, list[tuple[int, str]]] = {}
    config: dict[str, Any] = {}
    status = None
    for file in sorted((run / "trackers/wandb").glob(f"offline-run-*-{id}/run-{id}.wandb")):
        for content in _log_records(file.read_bytes()):
            record = Record.FromString(content)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "exit":
                status = str(record.exit.exit_code)
            elif kind == "history":
                row = {
                    tuple(each.nested_key) or (each.key,): json.loads(each.value_json) for each in record.history.item
                }
                step = row["_step",]
                for key, value in row.items():
                    if len(key) == 1 and not key[0].startswith("_"):
                        scalars.setdefault(key[0], []).append((step, value))
                    elif key[-1] == "path":
                        texts.setdefault(key[0], []).append((step, (file.parent / "files" / value).read_text()))
    config.pop("_wandb", None)
    return Found(scalars, texts, flat(config), status)


def _log_records(data: bytes) -> Iterator[bytes]:
    """The records of a log of LevelDB: blocks of 32 KiB with fragments, each after 7 bytes: checksum, length, kind."""
    assert data.startswith(b":W&B")
    place, record = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last fragment of one
            yield record
            record = b""


def found_in_mlflow(run: Path, id: str) -> Found:
    """From the store that ``MLFLOW_TRACKING_URI`` names."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    saved = client.get_run(id)
    scalars = {
        key: [(each.step, each.value) for each in sorted(client.get_metric_history(id, key), key=lambda e: e.timestamp)]
        for key in saved.data.metrics
    }
    artifacts = Path(saved.info.artifact_uri.removeprefix("file://"))
    texts: dict[str, list[tuple[int, str]]] = {}
    for file in sorted(artifacts.glob("*/step-*.md")):
        texts.setdefault(file.parent.name, []).append((int(file.stem.removeprefix("step-")), file.read_text()))
    changed = {key: value for key, value in saved.data.tags.items() if not key.startswith("mlflow.")}
    return Found(scalars, texts, saved.data.params | changed, saved.info.status)


def found_in_aim(run: Path, id: str) -> Found:
    """From the repository that ``AIM_REPO`` names, once the run is in its index, which ``aim up`` does by itself."""
    from aim import Repo
    from aim.sdk.index_manager import RepoIndexManager
    from aim.storage.context import Context

    RepoIndexManager(Repo(os.environ["AIM_REPO"])).index(id)
    saved = Repo(os.environ["AIM_REPO"]).get_run(id)
    frames = {metric.name: metric.dataframe() for metric in saved.metrics()}
    scalars = {tag: list(zip(frame["step"].astype(int), frame["value"], strict=True)) for tag, frame in frames.items()}
    texts = {}
    for tag in ("sample", "rank_table"):
        if sequence := saved.get_text_sequence(tag, Context({})):
            steps, (values, *_) = sequence.data.items_list()
            texts[tag] = [(int(step), text.data) for step, text in zip(steps, values, strict=True)]
    return Found(scalars, texts, flat(saved["config"]), None)


READERS = {"wandb": found_in_wandb, "mlflow": found_in_mlflow, "aim": found_in_aim}


def found_in(name: str, run: Path) -> Found:
    """What the tracker ``name`` holds of a run."""
    return READERS[name](run, json.loads(state_path(run, name).read_text())["id"])
