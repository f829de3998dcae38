"""Run folders for reports, written as a run writes them, without training."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from inrank_dist.lowrank.updates import recorded_spectrum
from inrank_dist.train.monitors import JsonlMonitor, Monitors

HTML = '"></title></script><script>document.title = "broken"</script><h1>broken</h1><!--'
RIGHT_TO_LEFT = "\u202e\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 "
LONG = "W" * 10_000
HOSTILE = HTML + RIGHT_TO_LEFT + LONG

CONFIG = "run:\n  name: {name}\nlowrank:\n  mode: efficient\n  threshold: 0.9\n"
KINDS = ("attention.q", "attention.k", "attention.v", "attention.out", "mlp.up", "mlp.down")


def write_run(
    folder: Path,
    *,
    steps: int = 400,
    blocks: int = 2,
    checks: int = 8,
    text: str = "",
    growing: bool = True,
    resumed_at: int = 0,
    finished: bool = True,
    width: int = 96,
) -> Path:
    """Write a run of ``steps`` steps with ``checks`` decisions in its first half, the last of which freezes the ranks.

    Args:
        text: put in front of every text that a run takes from its user: its name, layers, prompt, and sample.
        growing: whether there are low-rank layers and rank events; otherwise the updates of dense layers are tracked.
        resumed_at: step after which the run was resumed on two processes; 0 for never.
        finished: whether there is a summary.
        width: of the weights.
    """
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(name=json.dumps(f"{text}run")), encoding="utf-8")
    names = [f"{text}blocks.{block}.{kind}" for block in range(blocks) for kind in KINDS]
    monitors = Monitors([JsonlMonitor(folder / "metrics.jsonl")])
    start = {"kind": "start", "step": 0, "world_size": 1, "engine": "local", "device": "cpu", "model": f"{text}gpt2"}
    start |= {"mode": "efficient" if growing else "full", "parameters": 1_000_000, "steps": steps, "seed": 0}
    start |= {"unigram_entropy": 6.9, "train_tokens": 10_000_000, "initial_rank": 4, "threshold": 0.9}
    monitors.write(start | {"torch": "2.13.0", "ranks": dict.fromkeys(names if growing else [], 4)})
    every = max(1, steps // 2 // checks)
    ranks = dict.fromkeys(names, 4)
    parameters = 1_000_000
    for step in range(1, steps + 1):
        if resumed_at and step == resumed_at + 1:
            monitors.write({"kind": "resume", "step": resumed_at, "world_size": 2})
        noise = math.sin(step * 12.9898) * 0.2
        loss = 3 + 4 * math.exp(-6 * step / steps) + noise
        record = {"kind": "step", "step": step, "loss": loss, "tokens": step * 8192, "seconds": step * 0.25}
        record |= {"flops": step * 6.1e11, "tokens_per_s": 32_000 + 2000 * noise, "data_wait": 0.01, "lr": 6e-4}
        record |= {"grad_norm": 1 + noise, "parameters": parameters, "resident_memory": 2**30 + step * 1000}
        monitors.write(record)
        if step % every == 0 and step // every <= checks:
            records = (
                _decision(step, ranks, step // every == checks, width) if growing else [_updates(step, names, width)]
            )
            parameters += 50_000
            for each in records:
                monitors.write(each)
        if step % max(1, steps // 10) == 0:
            figures = {"perplexity": math.exp(loss), "bits_per_byte": loss / 3}
            monitors.write({"kind": "eval", "step": step, "loss": loss + 0.1, **figures})
    monitors.write({"kind": "sample", "step": steps, "prompt": f"{text}It was", "text": f" the best of times{text}"})
    if finished:
        summary = {
            "kind": "summary",
            "step": steps,
            "tokens": steps * 8192,
            "seconds": steps * 0.25,
            "perplexity": 22.2,
        }
        summary |= {"flops": steps * 6.1e11, "train_loss": 3.0, "validation_loss": 3.1, "bits_per_byte": 1.03}
        summary |= {"unigram_entropy": 6.9, "parameters": parameters, "parameters_dense": 2_000_000, "seed": 0}
        table = {name: {"rank": rank, "null_rank": 31, "shape": [4 * width, width]} for name, rank in ranks.items()}
        monitors.write(summary | {"parameters_start": 1_000_000, "ranks": table if growing else {}})
    monitors.close()
    return folder


def _decision(step: int, ranks: dict[str, int], is_last: bool, width: int) -> list[dict[str, Any]]:
    """The records of a decision in which every layer grows by 2 to 7, or of the freeze."""
    layers, changes = {}, {}
    for at, name in enumerate(ranks):
        before, ranks[name] = ranks[name], min(ranks[name] + (0 if is_last else 2 + at % 6), width - 8)
        sigma = _spectrum(ranks[name] + 8, 0.05 + 0.01 * at)
        told = {"rank": ranks[name], "found": ranks[name] + at % 2, "explained": 0.8, "reached": 0.9 + at % 9 / 100}
        told |= {"null_rank": 31, "effective_rank": float(sigma.sum() / sigma[0]), "norm": float(sigma.norm())}
        layers[name] = told | {"shape": [4 * width, width], **recorded_spectrum(sigma)}
        changes[name] = {"from": before, "to": ranks[name], "explained": 0.8, "reached": 0.9, "null_rank": 31}
    null = _spectrum(max(ranks.values()) + 8, 0.002)
    shape = {"shape": [4 * width, width], **recorded_spectrum(null / null.norm())}
    check = {"kind": "rank_check", "step": step, "seconds": 0.1, "threshold": 0.9, "shrinks": False, "layers": layers}
    event = {"kind": "rank_event", "step": step, "action": "freeze" if is_last else "grow", "seconds": 0.1}
    return [check | {"null_spectra": [shape]}, event | {"layers": changes}]


def _updates(step: int, names: Sequence[str], width: int) -> dict[str, Any]:
    sigma = _spectrum(width, 0.1) * step
    told = {"shape": [4 * width, width], "effective_rank": 5.0, "stable_rank": 2.0}
    told |= {"null_effective_rank": 20.0, "null_stable_rank": 10.0, **recorded_spectrum(sigma)}
    return {"kind": "updates", "step": step, "layers": dict.fromkeys(names, told), "seconds": 0.1}


def _spectrum(modes: int, decay: float) -> torch.Tensor:
    return torch.exp(-decay * torch.arange(modes, dtype=torch.float64))
