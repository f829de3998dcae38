"""Cost of checkpoints: training steps with asynchronous or synchronous saves, compared with steps without."""

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
from ..runtime.progress import counted
from ..train.checkpoint import list_checkpoints
from ..train.session import build
from .common import spread

MODES = ("off", "sync", "async")


@dataclass(frozen=True)
class Cost:
    """Time of a training step in each saving mode.

    Attributes:
        seconds: mode -> seconds per step, one value per round.
        bytes: size of one checkpoint.
        interval: steps per checkpoint.
    """

    seconds: dict[str, list[float]]
    bytes: int
    interval: int


def measure_checkpoints(config: Config, context: Context, data: Prepared, *, interval: int, rounds: int) -> Cost:
    """Train in rounds of ``interval`` steps, alternating between the modes. Each round saves once, after its first
    step.

    A round ends when its checkpoint is complete, so the cost of an asynchronous save to later steps is counted. The
    checkpoints are written below the run folder and removed afterwards. No rank events happen.
    """
    config.run.folder.mkdir(parents=True, exist_ok=True)
    name = tempfile.mkdtemp(prefix="bench-", dir=config.run.folder) if context.is_main else ""
    folder = Path(context.gather(name)[0])
    trainer = build(config, context, data)
    writer = trainer.writer
    writer.run_folder = folder
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    size = 0
    shown = counted(range(-1, rounds), "measuring", unit="rounds", enabled=context.is_main)
    for index in shown:  # the first round is a warm-up
        for mode in MODES:
            writer.settings = dataclasses.replace(writer.settings, async_=mode == "async", keep=1)
            context.barrier()
            start = time.perf_counter()
            for step in range(interval):
                trainer.take_step()
                if mode != "off" and step == 0:
                    trainer.save()
            writer.finish()
            context.barrier()
            if index >= 0:
                seconds[mode].append((time.perf_counter() - start) / interval)
    if context.is_main:
        size = sum(file.stat().st_size for file in list_checkpoints(folder)[-1].iterdir())
        shutil.rmtree(folder)
    return Cost(seconds, size, interval)


def as_table(cost: Cost) -> Table:
    """One row per mode: median (lowest-highest) over the rounds."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("checkpointing")
    for heading in ("ms per step", "ratio to off", "of which a save, ms"):
        table.add_column(heading, justify="right")
    off = statistics.median(cost.seconds["off"])
    for mode, rounds in cost.seconds.items():
        median = statistics.median(rounds)
        save = "-" if mode == "off" else f"{1e3 * cost.interval * (median - off):.1f}"
        table.add_row(mode, spread([1e3 * each for each in rounds]), f"{median / off:.3f}", save)
    return table
