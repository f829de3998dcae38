"""Small training runs in this process or in a worker of the pool."""

import copy
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file
from sharing import made_once

from inrank_dist.config import Config, load_config
from inrank_dist.data import prepare
from inrank_dist.engine.settings import ParallelSettings
from inrank_dist.runtime.context import Context
from inrank_dist.train.checkpoint import Checkpoint, list_checkpoints, resumable
from inrank_dist.train.loop import Trainer
from inrank_dist.train.monitors import Monitors
from inrank_dist.train.session import build

Fails = Callable[..., str]
"""Words of a command that must fail -> its error."""

SMALL = {
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.hidden_size": 32,
    "model.max_seq_len": 16,
    "lowrank.targets": "[all]",
    "lowrank.initial_rank": 1,
    "lowrank.buffer": 2,
    "lowrank.threshold": 0.995,
    "lowrank.interval": 8,
    "lowrank.warmup_steps": 24,
    "train.steps": 30,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "train.peak_tflops": 1,
    "optimizer.lr": 3e-3,
    "data.source": "files",
    "data.validation_fraction": 0.2,
    "tokenizer.vocab_size": 301,
    "checkpoint.interval": 0,
    "eval.interval": 0,
    "eval.sample_tokens": 0,
    "log.interval": 1,
}
"""30 steps with growth at 8 and 16 and the freeze at 24; a vocabulary that no number of processes divides. The peak is
given: measuring it takes each process up to 15 seconds in bfloat16."""

SHORT = SMALL | {
    "train.steps": 12,
    "lowrank.interval": 3,
    "lowrank.warmup_steps": 9,
    "train.micro_batch_size": 4,
}
"""12 steps with growth at 3 and 6 and the freeze at 9, on two processes one micro-batch: where neither the length nor
the accumulation is the point."""


def small_config(folder: Path, *, base: dict[str, Any] = SMALL, **changes: Any) -> Config:
    """``SMALL`` with changes (``section__key=value``); corpus, cache and run folder below ``folder``."""
    settings = base | {
        "data.paths": f"[{folder}/corpus/*.txt]",
        "data.cache_dir": f"{folder}/cache",
        "run.dir": f"{folder}/run{os.environ.get('PYTEST_XDIST_WORKER', '')}",  # workers share the corpus, not the run
    }
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(None, [f"--{key}={'null' if value is None else value}" for key, value in settings.items()])[0]


def short_config(folder: Path, **changes: Any) -> Config:
    """``SHORT`` with changes."""
    return small_config(folder, base=SHORT, **changes)


class Recorder:
    """A monitor that keeps the records, and the samples that each step trained on."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.samples: list[list[int]] = []

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def close(self) -> None:
        pass

    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records if record["kind"] == "step"]


def trainer_of(config: Config, context: Context, checkpoint: Checkpoint | None = None) -> Trainer:
    """A trainer with its data prepared; the context is started."""
    data = prepare(config.data, config.tokenizer, config.model.max_seq_len, progress=False)
    return build(config, context, data, checkpoint)


def train(
    config: Config, *, resume: bool = False, hook: Callable[[Trainer], None] | None = None
) -> tuple[Recorder, dict[str, Any]]:
    """Train as the command does; ``hook`` sees the trainer before it runs.

    Returns:
        The recorder, and the final rank table (layer -> rank, modes, base).
    """
    context, trainer = Context(), None
    context.start(60, always=config.parallel.resolve(context.world_size) != "local")
    try:
        recorder = Recorder()
        trainer = trainer_of(config, context, resumable(config.run.folder, context) if resume else None)
        next_batch = trainer.loader.next_batch

        def recorded() -> Any:
            batches = next_batch()
            recorder.samples.append([int(i) for batch in batches for i in batch.sample_ids])
            return batches

        trainer.loader.next_batch = recorded  # type: ignore[method-assign]
        if hook:
            hook(trainer)
        trainer.run(Monitors([recorder]))
        table = {name: (layer.rank, layer.modes, layer.base) for name, layer in trainer.engine.layout.items()}
        return recorder, table
    finally:
        trainer = None
        context.stop()


class Run(NamedTuple):
    """What one process of a run recorded, the samples of each of its steps, and the final rank table."""

    records: list[dict[str, Any]]
    samples: list[list[int]]
    table: dict[str, Any]

    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records if record["kind"] == "step"]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]


def train_in_worker(config: Config, resume: bool = False) -> Run:
    """``train`` for the pool."""
    recorder, table = train(config, resume=resume)
    return Run(recorder.records, recorder.samples, table)


def trained_once(config: Config) -> Run:
    """``train`` on one process; of equal configs only the first test of a test run trains.

    ``config`` may be of several processes; how they divide the work changes nothing here.
    """
    alone = copy.deepcopy(config)
    alone.parallel = ParallelSettings()
    alone.train.micro_batch_size = alone.train.global_batch_size
    alone.run.dir = None  # nothing of the result depends on it
    key = hashlib.sha256(alone.to_yaml().encode()).hexdigest()[:16]
    folder = Path(config.data.cache_dir).parent
    alone.run.dir = str(folder / f"reference-{key}")
    return Run(*made_once(folder, f"reference-{key}", lambda: tuple(train_in_worker(alone))))


def assert_same_run(result: list[Run], reference: Run, world_size: int) -> None:
    """Losses to 1e-5, gradient norms to 1e-4, ranks and samples exactly; ``result`` holds what every process returned.

    AdamW does not see the scale of a gradient: a norm that is wrong by a factor changes no loss.
    """
    assert result[0].losses() == pytest.approx(reference.losses(), rel=1e-5)
    norms, expected = ([record["grad_norm"] for record in run.of_kind("step")] for run in (result[0], reference))
    assert norms == pytest.approx(expected, rel=1e-4)
    for each in result:
        assert each.table == reference.table
    checks = [record["layers"] for record in reference.of_kind("rank_check")]
    for ours, theirs in zip([r["layers"] for r in result[0].of_kind("rank_check")], checks, strict=True):
        assert {n: (d["rank"], d["null_rank"]) for n, d in ours.items()} == {
            n: (d["rank"], d["null_rank"]) for n, d in theirs.items()
        }
    for step, samples in enumerate(reference.samples):
        assert [i for rank in range(world_size) for i in result[rank].samples[step]] == samples


def tensor_bytes(run_folder: Path) -> dict[tuple[str, str], bytes]:
    """The bytes of every tensor of the newest checkpoint, by file and name."""
    return bytes_of(list_checkpoints(run_folder)[-1])


def bytes_of(checkpoint: Path) -> dict[tuple[str, str], bytes]:
    """The bytes of every tensor of a checkpoint, by file and name."""
    return {
        (file.name, name): tensor.numpy().tobytes()
        for file in checkpoint.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def the_error(status: int, stderr: str) -> str:
    """The one line of a user's mistake."""
    assert status == 2, stderr
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")
