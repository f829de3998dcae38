"""Detection of non-finite losses and gradients and of loss spikes, with one small all-reduce per step."""

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
"""Number of previous losses that a loss is compared with."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on a step, which is the same in all processes.

    Attributes:
        loss: mean loss over the tokens of the global batch, in nats.
        norm: norm of the gradient before clipping.
        reason: why the optimizer step must be skipped, or None.
        processes: global ranks of the processes whose loss or gradient is not finite.
        spike: number of standard deviations by which the loss exceeds the mean of previous losses, if it is a spike,
            else None.
        stop: whether any process received a stop request.
        failed: whether an asynchronous checkpoint failed in any process.
    """

    loss: float
    norm: float
    reason: str | None
    processes: list[int]
    spike: float | None
    stop: bool
    failed: bool


class Health:
    """Checks every step and keeps a history of losses and skipped steps.

    Args:
        context: context of all processes.
        settings: settings of the section ``train``.
        lr: peak learning rate, for error messages.

    Attributes:
        skipped: number of steps skipped so far.
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
        """Return the verdict on a step.

        This takes one all-reduce of 40 bytes and the only synchronisation with the device in a step.

        Args:
            loss: summed loss of this process in nats, a scalar.
            norm: norm of the global gradient, a scalar.
            local_norm: norm of the rows of the gradient that this process holds, a scalar.
            local_nonfinite: whether this process computed a non-finite gradient, a bool scalar.
            tokens: number of tokens in the global batch.
            stop: whether this process received a stop request.
            failed: whether an asynchronous checkpoint failed in this process.
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
            # Prefer the processes that computed the value. After the reduction other processes hold it, too.
            marks = self.context.gather((bool(bad_loss), bool(local_nonfinite), bool(bad_rows)))
            signs = [[rank for rank, mark in enumerate(marks) if mark[sign]] for sign in range(3)]
            processes = next((found for found in signs if found), [])
        else:
            spike = self._spike(mean)
            if spike is not None and self.settings.skip_spikes:
                reason = f"the loss {mean:.4f} is a spike"
        return Verdict(mean, norm_, reason, processes, spike, stops > 0, failures > 0)

    def count(self, verdict: Verdict, step: int) -> None:
        """Record the verdict on a step.

        Args:
            verdict: the verdict.
            step: number of completed steps, including this one.

        Raises:
            UserError: if too many consecutive steps were skipped.
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
        """Return the JSON-serializable state."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "losses": self._losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self._in_a_row = int(state["skipped"]), int(state["in_a_row"])
        self._losses = [float(loss) for loss in state["losses"]]
        assert all(math.isfinite(loss) for loss in self._losses)


def _of(processes: list[int]) -> str:
    return f" (process {', '.join(map(str, processes))})" if processes else ""
