"""Small training runs in this process or in a worker of the pool."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from inrank_dist.config import Config, load_config
from inrank_dist.data import prepare
from inrank_dist.engine.context import Context
from inrank_dist.train.checkpoint import Checkpoint, list_checkpoints, resumable
from inrank_dist.train.loop import Trainer
from inrank_dist.train.monitors import Monitors

Fails = Callable[..., str]
"""Words of a command that must fail -> its error."""

TEXT = "the rank of a factor grows when the modes it has no longer explain what was learned so far"

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


def write_corpus(folder: Path) -> None:
    """Twenty short documents, the same on every machine."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, words = torch.Generator().manual_seed(0), TEXT.split()
    for index in range(20):
        picks = torch.randint(len(words), (400,), generator=generator).tolist()
        (folder / f"{index:02d}.txt").write_text(" ".join(words[i] for i in picks))


def small_config(folder: Path, **changes: Any) -> Config:
    """``SMALL`` with changes (``section__key=value``); corpus, cache and run folder below ``folder``."""
    settings = SMALL | {
        "data.paths": f"[{folder}/corpus/*.txt]",
        "data.cache_dir": f"{folder}/cache",
        "run.dir": f"{folder}/run",
    }
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(None, [f"--{key}={'null' if value is None else value}" for key, value in settings.items()])[0]


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
    return Trainer(config, context, data, checkpoint)


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


def train_in_worker(
    config: Config, resume: bool = False
) -> tuple[list[dict[str, Any]], list[list[int]], dict[str, Any]]:
    """``train`` for the pool: records, samples, rank table."""
    recorder, table = train(config, resume=resume)
    return recorder.records, recorder.samples, table


def tensor_bytes(run_folder: Path) -> dict[tuple[str, str], bytes]:
    """The bytes of every tensor of the newest checkpoint, by file and name."""
    newest = list_checkpoints(run_folder)[-1]
    return {
        (file.name, name): tensor.numpy().tobytes()
        for file in newest.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def the_error(status: int, stderr: str) -> str:
    """The one line of a user's mistake."""
    assert status == 2, stderr
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")
