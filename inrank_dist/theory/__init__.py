"""The laboratory: small experiments after papers, in float64, each seconds to minutes on two cores."""

from __future__ import annotations

from typing import Any

from . import completion, deep_lora, feedback, glrl, incremental, invariant, low_rank_conv, sensing, sgd_rank
from .experiment import Experiment

EXPERIMENTS: dict[str, Experiment[Any]] = {
    "incremental": incremental.EXPERIMENT,
    "glrl": glrl.EXPERIMENT,
    "invariant": invariant.EXPERIMENT,
    "completion": completion.EXPERIMENT,
    "sensing": sensing.EXPERIMENT,
    "sgd-rank": sgd_rank.EXPERIMENT,
    "feedback": feedback.EXPERIMENT,
    "low-rank-conv": low_rank_conv.EXPERIMENT,
    "deep-lora": deep_lora.EXPERIMENT,
}
"""Name -> experiment. A new one is a file and a line here."""
