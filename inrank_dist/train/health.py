"""Is this step fit to be taken? All processes answer together, with one small all-reduce a step."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime.context import Context
from ..runtime.errors import UserError
from .settings import TrainSettings

WINDOW = 64
"""Losses of the steps before, to which a step's loss is compared."""


@dataclass(frozen=True)
class Verdict:
    """What all processes found about a step, the same in each.

    Attributes:
        loss: mean over the tokens of the global batch, in nats.
        norm: of the gradient, before clipping.
        reason: why the optimizer must not move; None: it may.
        processes: those whose local_nonfinite loss or gradient is no number.
        spike: how many standard deviations the loss lies above the last ones, where that is too many.
        stop: whether any process was asked to stop.
        failed: whether a checkpoint could not be written behind the training in any process.
    """

    loss: float
    norm: float
    reason: str | None
    processes: list[int]
    spike: float | None
    stop: bool
    failed: bool


class Health:
    """Judges every step, and remembers what it needs for that.

    Attributes:
        skipped: steps skipped so far.

    Args:
        context: all processes.
        settings: section ``train``.
        lr: peak learning rate, for the message.
    """

    def __init__(self, context: Context, settings: TrainSettings, lr: float) -> None:
        self.context, self.settings, self.lr = context, settings, lr
        self.skipped, self._in_a_row = 0, 0
        self._losses: list[float] = []

    def judge(
        self,
        loss: Tensor,
        norm: Tensor,
        local_norm: Tensor,
        local_nonfinite: Tensor,
        tokens: int,
        *,
        stop: bool,
        failed: bool,
    ) -> Verdict:
        """One all-reduce of 40 bytes, and the step's one synchronisation with the device.

        Args:
            loss: this process's summed loss.
            norm: of the whole gradient.
            local_norm: norm of the rows of the gradient that this process holds.
            local_nonfinite: whether this process itself computed a gradient that is not finite; bool.
            tokens: of the global batch.
            stop, failed: whether this process was asked to stop; whether it knows of a failed save.
        """
        bad_loss, bad_rows = ~torch.isfinite(loss), ~torch.isfinite(local_norm)
        bad_gradient = local_nonfinite | bad_rows | ~torch.isfinite(norm)
        flags = torch.tensor([stop, failed], dtype=torch.float64).to(loss.device, non_blocking=True)
        sums = torch.cat([torch.stack([loss.double(), bad_loss.double(), bad_gradient.double()]), flags])
        self.context.sum(sums)
        total, losses, gradients, stops, failures, norm_ = *sums.tolist(), norm.item()
        mean = total / tokens
        reason, processes, spike = None, [], None
        if losses or gradients:
            reason = "the loss is not finite" if losses else "the gradient is not finite"
            # Who computed it, if anyone; else who holds it: a sum over processes spreads it to all.
            marks = self.context.gather((bool(bad_loss), bool(local_nonfinite), bool(bad_rows)))
            signs = [[rank for rank, mark in enumerate(marks) if mark[sign]] for sign in range(3)]
            processes = next((found for found in signs if found), [])
        else:
            spike = self._spike(mean)
            if spike is not None and self.settings.skip_spikes:
                reason = f"the loss {mean:.4f} is a spike"
        return Verdict(mean, norm_, reason, processes, spike, stops > 0, failures > 0)

    def count(self, verdict: Verdict, step: int) -> None:
        """Remember a judged step.

        Args:
            step: steps completed, this one included.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        if verdict.reason is None:
            self._in_a_row = 0
            self._losses = [*self._losses[1 - WINDOW :], verdict.loss]
            return
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= self.settings.max_skipped:
            raise UserError(
                f"at step {step} {verdict.reason}{_of(verdict.processes)}, and {self._in_a_row} steps in a row were "
                f"skipped (train.max_skipped); write a lower optimizer.lr than {self.lr} or a longer "
                "schedule.warmup_steps, or go on from an earlier checkpoint"
            )

    def _spike(self, loss: float) -> float | None:
        if not self.settings.spike_deviations or len(self._losses) < WINDOW:
            return None
        deviation = statistics.pstdev(self._losses)
        above = (loss - statistics.fmean(self._losses)) / max(deviation, 1e-12)
        return above if above > self.settings.spike_deviations else None

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state; ``load_state_dict`` continues from it."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "losses": self._losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self._in_a_row = int(state["skipped"]), int(state["in_a_row"])
        self._losses = [float(loss) for loss in state["losses"]]
        assert all(math.isfinite(loss) for loss in self._losses)


def _of(processes: list[int]) -> str:
    return f" (process {', '.join(map(str, processes))})" if processes else ""
