"""Runs of a study that are made up: what they would have written is there, and nobody has trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from inrank_dist.study import Worker
from inrank_dist.study.work import Run


def pretend(worker: Worker, cost: Callable[[Run], float], loss: Callable[[Run], float | None]) -> None:
    """Make up all runs of a study, also those that can be named only then.

    Args:
        cost: of a step and of the parameters, relative to a dense model.
        loss: None if the run diverged.
    """
    while pending := worker.pending():
        for run in pending:
            run.folder.mkdir(parents=True)
            if (value := loss(run)) is None:
                (run.folder / "failed").write_text("it diverged\n")
                continue
            dense = dict(run.variant.settings).get("lowrank.mode") == "full"
            start = {"kind": "start", "step": 0, "torch": "2", "device": "cpu", "data_fingerprint": "a"}
            summary: dict[str, Any] = {
                "kind": "summary", "step": run.steps, "validation_loss": value, "tokens": run.steps * 2048,
                "flops": run.steps * cost(run) * 1e10, "seconds": run.steps * cost(run),
                "parameters": round(1e6 * cost(run)), "peak_memory": 2**29,
                "ranks": {} if dense else {"blocks.0.mlp.up": {"rank": 8, "null_rank": 28.7}},
            }  # fmt: skip
            lines = [json.dumps(record) + "\n" for record in (start, summary)]
            (run.folder / "metrics.jsonl").write_text("".join(lines))
