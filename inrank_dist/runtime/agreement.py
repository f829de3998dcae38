"""Checks that all processes hold the same answers."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist


class Disagreement(RuntimeError):
    """Processes computed different results where they must be identical."""


def agree(what: str, answers: Mapping[str, object], device: torch.device) -> None:
    """Check by hash that all processes hold the same answers. Costs one small all-reduce when they do.

    Args:
        what: description for the error message.
        answers: name -> JSON-serializable value, compared exactly.
        device: for the all-reduce; must match the backend of the process group.

    Raises:
        Disagreement: on every process, with the names whose values differ.
    """
    if not dist.is_initialized():
        return
    digest = _digest(answers)
    extremes = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if extremes[0] == -extremes[1]:
        return
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {name: _digest(answer) for name, answer in answers.items()})
    names = sorted(
        {name for each in gathered for name in each if any(other.get(name) != each[name] for other in gathered)}
    )
    raise Disagreement(f"processes disagree on {what} of: {', '.join(names)}")


def _digest(answer: object) -> int:
    text = json.dumps(answer, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
