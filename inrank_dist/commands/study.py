"""``inrank study``: compares variants of one config with their controls."""

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..runtime.home import path_argument
from ..runtime.stop import Stopped
from ..study import Worker, compare, read_study
from ..study.page import notes, tables, write_results
from .common import at_least_one, console, no_overrides

log = logging.getLogger("inrank_dist")

DESCRIPTION = """\
Trains variants of one config, each with its control, over the same seeds, and writes one table (study.html and
study.json in the study's folder). Tuning uses separate seeds. Runs that are already done are not repeated; if stopped,
the command shows the variants that are done, and the same command resumes. Several workers may share one study, on one
machine or as a Slurm array (sbatch --array=1-8 ... inrank study FILE): each takes runs that no other worker has taken.

FILE, for example:

  base: quickstart.yaml            a config, relative to FILE
  dir: runs/my-study               (default: runs/ and the name of FILE)
  processes: 1                     per run
  seeds: [0, 1, 2]
  tuning_seeds: [100]
  budget:                          per run; tokens: default that of the base config
    tokens: 1.2e6
    flops: control                 a second table: as many as its control used (of a chain of controls the last one),
    seconds: control               or a number; and a third table
  settings: {eval.batches: 32}     for all variants
  variants:
    dense:
      settings: {lowrank.mode: full}
      tune: {optimizer.lr: [1e-3, 2e-3, 4e-3]}
    inrank:
      control: dense
      tune: {optimizer.lr: [1e-3, 2e-3, 4e-3]}
      seconds_per_step: 0.21       for equal time, if measured elsewhere; default: that of the runs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``FILE [--workers N] [--threads N] [--dry-run]``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.add_argument("file", metavar="FILE", type=path_argument, help="YAML file of the study")
    parser.add_argument(
        "--workers", metavar="N", type=int, default=1, help="concurrent runs on this machine (default 1)"
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=int,
        help="per process of a run (sets OMP_NUM_THREADS; with several workers, the cores divided by all processes)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check the file and list the runs without starting any")


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Do the remaining runs of a study and show its results."""
    no_overrides(rest)
    at_least_one(arguments, "workers", "threads")
    study = read_study(arguments.file)
    threads = arguments.threads
    if threads is None and arguments.workers > 1:
        threads = max(1, (os.cpu_count() or 1) // (arguments.workers * study.processes))
    worker = Worker(study, threads)
    if arguments.dry_run:
        runs = worker.runs()
        for each in runs:
            print(f"{'done' if worker.outcome(each) else 'to do'}  {each.title()}")
        print(f"{len(runs)} runs can be named by now; those of tuned variants follow their grids")
        return
    try:
        with _more_workers(arguments.file, arguments.workers - 1, threads):
            worker.work()
    except Stopped:
        _show(worker)
        raise
    _show(worker)


def _show(worker: Worker) -> None:
    """Print and write the results of the variants whose runs are all done."""
    study, comparison = worker.study, compare(worker)
    if not any(comparison.tables.values()):
        return
    page, record = write_results(study, comparison)
    screen = console(width=240)
    for table in tables(comparison):
        screen.print(table)
        screen.print()
    for sentence in notes(study, comparison):
        print(sentence)
    log.info("%s, %s", page, record)


@contextmanager
def _more_workers(file: Path, count: int, threads: int | None) -> Iterator[None]:
    """Run ``count`` more workers within the context. They exit when all is done, or are stopped when this one is."""
    argv = [sys.executable, "-m", "inrank_dist", "study", str(file), *(["--threads", str(threads)] if threads else [])]
    workers = [subprocess.Popen(argv, stdout=subprocess.DEVNULL, start_new_session=True) for _ in range(count)]
    try:
        yield
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    finally:
        for worker in workers:
            worker.wait()
