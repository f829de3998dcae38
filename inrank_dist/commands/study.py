"""``inrank study``: variants of one config against their controls."""

import argparse
import logging
from collections.abc import Sequence

from ..runtime.home import path_argument
from ..study import Worker, compare, read_study
from ..study.page import notes, tables, write_results
from .common import at_least_one, console, no_overrides

log = logging.getLogger("inrank_dist")

DESCRIPTION = """\
Trains variants of one config, each with its control, over the same seeds, and writes one table (study.html and
study.json in the study's folder). What is tuned is chosen on other seeds. Runs that are there are not done again;
stopped, the same command goes on. Several of it may work on one study, on one machine or as a Slurm array
(sbatch --array=1-8 ... inrank study FILE): each takes runs that nobody has taken.

FILE, for example:

  base: quickstart.yaml            a config, beside FILE
  dir: runs/my-study               (default runs/ and the name of FILE)
  processes: 1                     of each run
  seeds: [0, 1, 2]
  tuning_seeds: [100]
  budget:                          of each run; tokens: those of the base config, unless said otherwise
    tokens: 1.2e6
    flops: control                 a second table: as many as its control used, or a number
    seconds: control               and a third
  settings: {eval.batches: 32}     of all
  variants:
    dense:
      settings: {lowrank.mode: full}
      tune: {optimizer.lr: [1e-3, 2e-3, 4e-3]}
    inrank:
      control: dense
      tune: {optimizer.lr: [1e-3, 2e-3, 4e-3]}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``FILE [--threads N] [--dry-run]``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.add_argument("file", metavar="FILE", type=path_argument, help="YAML file of the study")
    parser.add_argument("--threads", metavar="N", type=int, help="of each process of a run (sets OMP_NUM_THREADS)")
    parser.add_argument("--dry-run", action="store_true", help="check the file, say what would be run, touch nothing")


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Do what is left of a study and show its results."""
    no_overrides(rest)
    at_least_one(arguments, "threads")
    study = read_study(arguments.file)
    worker = Worker(study, arguments.threads)
    if arguments.dry_run:
        runs = worker.runs()
        for each in runs:
            print(f"{'done' if worker.outcome(each) else 'to do'}  {each.title()}")
        print(f"{len(runs)} runs can be named by now; those of tuned variants follow their grids")
        return
    worker.work()
    comparison = compare(worker)
    page, record = write_results(study, comparison)
    screen = console(width=240)
    for table in tables(comparison):
        screen.print(table)
        screen.print()
    for sentence in notes(study, comparison):
        print(sentence)
    log.info("%s, %s", page, record)
