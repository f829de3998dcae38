"""What a checkpoint costs the training: steps with a save behind them or in step with them, against steps without."""

import dataclasses
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ..config import Config
from ..data import Prepared
from ..runtime.context import Context
from ..train.checkpoint import list_checkpoints
from ..train.loop import Trainer
from .common import spread

WAYS = ("off", "sync", "async")


@dataclass(frozen=True)
class Cost:
    """Time of a training step for each way of saving.

    Attributes:
        seconds: way -> seconds per step, one value a round.
        bytes: of one checkpoint.
        interval: steps to a checkpoint.
    """

    seconds: dict[str, list[float]]
    bytes: int
    interval: int


def measure_checkpoints(config: Config, context: Context, data: Prepared, *, interval: int, rounds: int) -> Cost:
    """Train in rounds of ``interval`` steps, each way of saving in turn, each round with one save after its first step.

    A round ends when its checkpoint is complete, so what a save behind the training takes away from later steps is
    counted, too. Checkpoints go below the run folder and are removed. No rank event happens meanwhile.
    """
    config.run.folder.mkdir(parents=True, exist_ok=True)
    place = tempfile.mkdtemp(prefix="bench-", dir=config.run.folder) if context.is_main else ""
    folder = Path(context.gather(place)[0])
    trainer = Trainer(config, context, data)
    writer = trainer.writer
    writer.run_folder = folder
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    size = 0
    for index in range(-1, rounds):  # the first round only warms up
        for way in WAYS:
            writer.settings = dataclasses.replace(writer.settings, async_=way == "async", keep=1)
            context.barrier()
            began = time.perf_counter()
            for step in range(interval):
                trainer.take_step()
                if way != "off" and step == 0:
                    trainer.save()
            writer.finish()
            context.barrier()
            if index >= 0:
                seconds[way].append((time.perf_counter() - began) / interval)
    if context.is_main:
        size = sum(file.stat().st_size for file in list_checkpoints(folder)[-1].iterdir())
        shutil.rmtree(folder)
    return Cost(seconds, size, interval)


def as_table(cost: Cost) -> Table:
    """One row a way: median (lowest-highest) over the rounds."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("checkpointing")
    for heading in ("ms per step", "ratio to off", "of which a save, ms"):
        table.add_column(heading, justify="right")
    off = statistics.median(cost.seconds["off"])
    for way, rounds in cost.seconds.items():
        median = statistics.median(rounds)
        save = "-" if way == "off" else f"{1e3 * cost.interval * (median - off):.1f}"
        table.add_row(way, spread([1e3 * each for each in rounds]), f"{median / off:.3f}", save)
    return table
