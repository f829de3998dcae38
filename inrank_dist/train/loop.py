"""The training loop."""

import math
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from .. import __version__
from ..config import Config
from ..data import Prefetcher, Prepared
from ..engine.cost import held_bytes
from ..engine.engine import Batches, Engine
from ..method.controller import RankController
from ..runtime.context import Context
from ..runtime.errors import UserError
from ..runtime.stop import Stopped, StopRequest
from ..runtime.watch import STEP_TIMEOUT, TIMEOUT
from .arithmetic import FlopCounter
from .building import cost_setup
from .callbacks import Callback
from .checkpoint import CheckpointWriter, TrainState
from .clock import Clock
from .evaluation import validation_loss
from .health import Health, Verdict
from .monitors import Monitors
from .profiling import Profile, StepProfiler, memory_split
from .randomness import seed_step
from .records import loss_figures, notice
from .schedule import planned_rate


class Trainer:
    """The training loop of a run, executed by all processes. ``session.build`` creates it from a configuration.

    Args:
        config: the configuration.
        context: context with an initialised process group.
        data: the prepared data.
        loader: loader of the training data.
        engine: engine of the model and its optimizer.
        ranks: controller of the rank events.
        health: checks for non-finite values and loss spikes.
        writer: writer of checkpoints.
        profiler: profiler of selected steps.
        flops: counter of floating-point operations.
        callbacks: callbacks, called in this order.
        state: state in the checkpoint that the run resumes from, or None.
        branched_from: run folder of that checkpoint if it belongs to another run, else None.
        stop: stop request of this process.
        heartbeat: called before each activity with its name, its timeout in seconds and the setting of the timeout; see
            ``Watch.heartbeat``.
        before_save: called in process 0 before each checkpoint. All processes raise its exceptions.

    Attributes:
        step: number of completed optimizer steps.
        tokens: number of tokens processed.
        seconds: training time in seconds.
        train_loss: last logged training loss, or None.
        validation: last validation loss in this process, or None.
        evaluation_due: whether the validation after this step is still to be done.
        monitors: destinations of the run's records.
    """

    def __init__(
        self,
        config: Config,
        context: Context,
        data: Prepared,
        *,
        loader: Prefetcher,
        engine: Engine,
        ranks: RankController,
        health: Health,
        writer: CheckpointWriter,
        profiler: StepProfiler,
        flops: FlopCounter,
        callbacks: Sequence[Callback],
        state: TrainState | None,
        branched_from: Path | None,
        stop: StopRequest,
        heartbeat: Callable[..., None],
        before_save: Callable[[], None],
    ) -> None:
        self.config, self.context, self.data, self.monitors = config, context, data, Monitors()
        self.loader, self.engine, self.ranks, self.health = loader, engine, ranks, health
        self.writer, self.profiler, self.flops, self.callbacks = writer, profiler, flops, callbacks
        self.stop, self.heartbeat, self._before_save = stop, heartbeat, before_save
        self.branched_from = branched_from
        self.step, self.tokens, self.seconds, self.evaluation_due = 0, 0, 0.0, False
        self.train_loss: float | None = None
        self.validation: float | None = None
        if state:
            self.step, self.tokens, self.seconds = state.step, state.tokens, state.seconds
            self.train_loss, self.evaluation_due = state.train_loss, state.evaluation_due
        self._resumed_at = self.step if state and not branched_from else None  # the checkpoint of this step exists
        self.clock = Clock(self.seconds, self.tokens)

    def run(self, monitors: Monitors) -> None:
        """Train until the last step.

        Args:
            monitors: destinations of the run's records. Empty on all processes except process 0.

        Raises:
            UserError: if training has diverged, or a checkpoint cannot be written.
            Stopped: after a stop request, once the checkpoint of the last completed step is written.
        """
        self.monitors = monitors
        with closing(self.loader):
            self._run()

    def _run(self) -> None:
        self.clock = Clock(self.seconds, self.tokens)
        patience, setting = float(self.config.parallel.timeout_seconds), TIMEOUT
        for callback in self.callbacks:
            callback.on_start(self)
        if self.branched_from:  # makes this run independent of its parent
            self.save()
            self._resumed_at = self.step
        self._between_steps(stop=False)
        longest, settled = 0.0, False
        while self.step < self.config.train.steps:
            is_profiled = self.step + 1 in self.profiler.steps
            if is_profiled and patience < self.config.parallel.timeout_seconds:
                patience, setting = float(self.config.parallel.timeout_seconds), TIMEOUT
            self.heartbeat(f"step {self.step + 1}", patience, setting)
            began = time.perf_counter()
            stop, reshaped = self._step_and_events()
            seconds = time.perf_counter() - began
            self._between_steps(stop)
            # The step timeout follows the longest step since the last start or reshape, which may have compiled.
            if not is_profiled:
                longest, settled = max(longest, seconds) if settled else seconds, True
            settled = settled and not reshaped
            patience, setting = max(float(self.config.parallel.step_timeout_seconds), 5 * longest), STEP_TIMEOUT
            if reshaped and patience < self.config.parallel.timeout_seconds:
                patience, setting = float(self.config.parallel.timeout_seconds), TIMEOUT
        self.heartbeat("the end of the run", float(self.config.parallel.timeout_seconds))
        self._refuse_lost()  # before the callbacks sample text and write a summary
        for callback in self.callbacks:
            callback.on_end(self)
        self.save()
        self.writer.finish()
        self.writer.close()

    def _step_and_events(self) -> tuple[bool, bool]:
        """Run an optimizer step, its rank event and the callbacks.

        Returns:
            Whether any process received a stop request, and whether any layer changed its shape.
        """
        (batches, verdict, rate), write = self.profiler.run(self.step + 1, self.take_step)
        if write:
            with self.clock.stopped():
                self.heartbeat(f"writing the trace of step {self.step}", self.config.parallel.timeout_seconds)
                self._tell_profile(write())
        if verdict.reason or verdict.spike is not None:
            self.monitors.write(notice(verdict, self.step, self.health.skipped))
        if verdict.failed:
            self.writer.finish()  # raises the error of the failed save
        before = self.engine.layout
        if self.ranks.due(self.step):
            self.heartbeat(f"the rank event after step {self.step}", self.config.parallel.timeout_seconds)
        # A non-finite gradient provides no direction for new modes.
        gradients = None if verdict.reason else partial(self.engine.factor_gradients, batches, self._tokens_per_step)
        records = self.ranks.after_step(self.step, gradients)
        self.seconds = self.clock.seconds
        if self.is_due(self.config.log.interval) and math.isfinite(verdict.loss):
            self.train_loss = verdict.loss
        for callback in self.callbacks:
            callback.on_step_end(self, verdict, rate, records)
        self.evaluation_due = self.is_due(self.config.eval.interval) and self.config.eval.interval > 0
        return verdict.stop, self.engine.layout != before

    def take_step(self) -> tuple[Batches, Verdict, float]:
        """Run the next optimizer step. Return its micro-batches, the verdict on it and its learning rate."""
        batches = [(batch.inputs, batch.targets) for batch in self.loader.next_batch()]
        self.flops.count(self._tokens_per_step)
        if self.step == 0:
            self.ranks.start(partial(self.engine.factor_gradients, batches, self._tokens_per_step))
        verdict, rate = self._update(batches)
        self.step += 1
        return batches, verdict, rate

    def _between_steps(self, stop: bool) -> None:
        """Validate and save a checkpoint if they are due.

        Args:
            stop: whether any process received a stop request.

        Raises:
            Stopped: after a stop request.
        """
        last = self.step == self.config.train.steps
        permanent_due = self._saves(self.config.checkpoint.interval)
        ephemeral_due = self._saves(self.config.checkpoint.ephemeral_interval)
        with self.clock.stopped():
            if self.evaluation_due and not stop:
                stop = not self._evaluate()
            if stop and (self.evaluation_due or not last):
                if self.step != self._resumed_at:
                    self.save(ephemeral=not permanent_due)
                self.writer.finish()
                raise Stopped(f"saved at step {self.step} and stopped; the same command goes on from there")
            if (permanent_due or ephemeral_due) and not last and self.step != self._resumed_at:
                self.save(ephemeral=not permanent_due)

    def _saves(self, interval: int) -> bool:
        return interval > 0 and self.step > 0 and self.step % interval == 0

    def _update(self, batches: Batches) -> tuple[Verdict, float]:
        """Run the forward and backward passes, and the optimizer unless the verdict is to skip the step."""
        seed_step(self.config.run.seed, self.step, self.context.rank, self.engine.device)
        rate = planned_rate(self.config, "lr", self.step, factored=bool(self.engine.layout))
        self.ranks.before_step(self.step)
        loss = self.engine.accumulate(batches, self._tokens_per_step)
        norm, local_norm = self.engine.gradient_norm()
        stop, failed = self.stop.signal is not None, self.writer.failure
        bad = self.engine.bad_gradient
        verdict = self.health.judge(loss, norm, local_norm, bad, self._tokens_per_step, stop=stop, failed=failed)
        if verdict.reason:
            self.engine.drop_gradients()
        else:
            self.engine.step(rate, norm)
        self.tokens += self._tokens_per_step
        self.health.count(verdict, self.step + 1)
        return verdict, rate

    @property
    def _tokens_per_step(self) -> int:
        return self.config.train.global_batch_size * self.data.block_length

    def is_due(self, interval: int) -> bool:
        """Return whether an action that runs every ``interval`` steps and at the last step is due."""
        return self.step == self.config.train.steps or (interval > 0 and self.step % interval == 0)

    def _tell_profile(self, profile: Profile | None) -> None:
        if profile is None:
            return
        held = held_bytes(self.flops.unsharded, cost_setup(self.config, self.context.world_size))
        memory = memory_split(held, profile.most, on_gpu=self.engine.device.type == "cuda")
        self.monitors.write({"kind": "profile", "step": self.step, "trace": str(profile.trace), "memory": memory})

    def _evaluate(self) -> bool:
        """Compute the validation loss. Return False if it was interrupted by a stop request."""
        batches = self.config.eval.batches
        self.ranks.before_step(self.step)  # sets the scale of the dense base for this step
        self.engine.model.eval()
        found = validation_loss(
            self.data,
            self.engine.loss,
            batch_size=self.config.train.micro_batch_size,
            max_sequences=batches * self.config.train.global_batch_size if batches else None,
            device=self.engine.device,
            rank=self.context.rank,
            world_size=self.context.world_size,
            add_up=self.context.sum,
            interrupted=self._anyone_stops,
        )
        if found is None:
            return False
        self.validation, self.evaluation_due = found.loss, False
        sources = {"sources": found.sources} if found.sources else {}
        figures = loss_figures(found.loss, self.data.bytes_per_token)
        figures["held_out_tokens"] = found.tokens
        self.monitors.write({"kind": "eval", "step": self.step, "loss": found.loss, **figures, **sources})
        return True

    def _anyone_stops(self) -> bool:
        self.heartbeat(f"the validation after step {self.step}", self.config.parallel.timeout_seconds)
        asked = torch.tensor(float(self.stop.signal is not None), device=self.engine.device)
        self.context.sum(asked)
        return bool(asked)

    def save(self, *, ephemeral: bool = False) -> None:
        """Write a checkpoint of the current step, in the background with ``checkpoint.async``.

        Args:
            ephemeral: remove the checkpoint once a newer one is complete.

        Raises:
            UserError: if it cannot be written, or the weights are not finite. Such a checkpoint would replace a valid
                one.
        """
        self._refuse_lost()
        self.heartbeat(f"saving the checkpoint of step {self.step}", self.config.parallel.timeout_seconds)
        self.context.on_rank_zero(self._before_save)
        state = TrainState(
            step=self.step,
            optimizer_steps=self.engine.optimizer_steps,
            tokens=self.tokens,
            seconds=self.seconds,
            flops=self.flops.of_run,
            train_loss=self.train_loss,
            evaluation_due=self.evaluation_due,
            layout=self.engine.layout,
            ranks=self.ranks.state_dict(),
            loader=self.loader.state().to_dict(),
            health=self.health.state_dict(),
            vocab_size=self.data.tokenizer.vocab_size,
            fingerprint=self.data.fingerprint,
            unigram_entropy=self.data.unigram_entropy,
            tokenizer=self.data.tokenizer.fingerprint,
            world_size=self.context.world_size,
            versions=_versions(),
            callbacks={callback.name: callback.state_dict() for callback in self.callbacks if callback.name},
        )
        self.writer.save(self.engine, state, ephemeral=ephemeral)

    def _refuse_lost(self) -> None:
        """Raise UserError on every process if any process holds a weight or moment that is not finite."""
        lost = self.engine.is_lost()
        self.context.sum(lost)
        if lost:
            raise UserError(
                f"at step {self.step} weights or moments are not finite, so no checkpoint was written; go on from the "
                f"last one with a lower optimizer.lr than {self.config.optimizer.lr} and --allow-change optimizer.lr"
            )


def _versions() -> dict[str, str]:
    return {"inrank_dist": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
