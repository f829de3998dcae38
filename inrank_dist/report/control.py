"""The control of a low-rank run: a full-rank run of the same model on the same data, in the same parent folder."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError
from .run import ON_FACTORS, Run, read_run, read_settings, value_of

SAME = ("model", "data", "tokenizer")
"""Sections that are equal in a run and its control."""

SAME_SETTINGS = (("train", "steps"), ("train", "global_batch_size"))

MOST_FOLDERS = 200
"""Folders of the parent that are looked at, the latest first."""


def control_sentence(run: Run) -> str:
    """Say how to compare a low-rank run with its control, or which command trains one; empty for other runs."""
    if value_of(run.settings, "lowrank", "mode") in (None, "full"):
        return ""
    folder = os.fspath(run.folder)
    control = find_control(run)
    if control is not None:
        loss = control.history.validation_loss
        known = f", validation loss {loss:.3f}" if loss is not None else ""
        seed = ", the same seed" if _seed(control) == _seed(run) else ", another seed"
        state = "" if control.history.ended else ", not finished"
        command = shlex.join(["inrank", "compare", folder, os.fspath(control.folder)])
        return f"A control beside it is {control.folder.name} (full rank{known}{seed}{state}): `{command}`."
    dense = f"{folder}-dense"
    world = run.history.first("world_size")
    many = isinstance(world, int) and world > 1
    start = ["launch/torchrun.sh", "-n", str(world)] if many else ["inrank"]
    words = [*start, "train", "--config", os.fspath(run.folder / "config.yaml"), "--lowrank.mode", "full"]
    if value_of(run.settings, "optimizer", "name") in ON_FACTORS:
        words += ["--optimizer.name", "muon"]
    words += ["--run.name", f"{run.name}-dense", "--run.dir", dense]
    compare = shlex.join(["inrank", "compare", folder, dense])
    sentence = (
        f"There is no control in the folder of this run. This trains one: `{shlex.join(words)}`; then `{compare}`."
    )
    if value_of(run.settings, "model", "init_from") is not None:
        sentence += (
            " It trains all weights of the loaded model, for which the learning rate of factors may be wrong: tune "
            "optimizer.lr of the control before comparing."
        )
    return sentence


def find_control(run: Run) -> Run | None:
    """Return the control of a run: with the same seed and finished, if there is such a one."""
    found = []
    for folder, settings in _siblings(run.folder):
        if _is_control(settings, run.settings):
            try:
                found.append(read_run(folder))
            except UserError:  # it has not begun, or is damaged
                continue
    # The latest one of the best.
    return max(reversed(found), key=lambda control: (_seed(control) == _seed(run), control.history.ended), default=None)


def _siblings(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The other run folders in the same parent with their settings, the latest first."""
    here = folder.resolve()
    times: list[tuple[float, Path]] = []
    try:
        for path in here.parent.iterdir():
            if path != here and (path / "config.yaml").is_file() and (path / "metrics.jsonl").is_file():
                times.append(((path / "metrics.jsonl").stat().st_mtime, folder.parent / path.name))
    except OSError:
        return
    for _, path in sorted(times, reverse=True)[:MOST_FOLDERS]:
        try:
            yield path, read_settings(path)[1]
        except UserError:
            continue


def _is_control(settings: dict[str, Any], wanted: dict[str, Any]) -> bool:
    if value_of(settings, "lowrank", "mode") != "full":
        return False
    if any(value_of(settings, *key) != value_of(wanted, *key) for key in SAME_SETTINGS):
        return False
    return all(_without_cache(settings.get(section)) == _without_cache(wanted.get(section)) for section in SAME)


def _without_cache(section: Any) -> Any:
    return {key: value for key, value in section.items() if key != "cache_dir"} if isinstance(section, dict) else None


def _seed(run: Run) -> Any:
    return value_of(run.settings, "run", "seed")
