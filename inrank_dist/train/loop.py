"""The training loop."""

import logging
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import torch

from .. import __version__
from ..config import Config
from ..data import Loader, LoaderState, Prefetcher, Prepared
from ..engine.cost import held_bytes
from ..engine.engine import Batches
from ..lowrank.convert import Layout, convert
from ..lowrank.init import generator_for
from ..method.controller import RankController
from ..method.start import StartValues, fits, layer_shapes, start_layout
from ..models import LanguageModel, flops_per_token
from ..runtime.context import Context
from ..runtime.errors import UserError
from ..runtime.stop import Stopped, StopRequest
from ..runtime.watch import STEP_TIMEOUT, TIMEOUT
from .checkpoint import Checkpoint, CheckpointWriter, TrainState, load_tensors
from .evaluation import validation_loss
from .health import Health, Verdict
from .memory import peak_resident_bytes
from .monitors import Monitors
from .profiling import Profile, StepProfiler, memory_split
from .randomness import seed_step
from .sampling import NotFinite, sample_tokens
from .schedule import learning_rate
from .speed import known_peak
from .start import build_engine, cost_setup, dense_skeleton

log = logging.getLogger("inrank_dist")


class Trainer:
    """One run, from its start or from a checkpoint to its last step. All processes do the same.

    Args:
        config: all settings.
        context: with its process group up.
        data: the prepared data.
        checkpoint: where to continue, or None.
        stop: asks this process to stop.
        heartbeat: told what is done next, how many seconds that may take, and by which setting (``Watch.heartbeat``).
        before_save: called by process 0 before each checkpoint; what it raises is raised by all.

    Raises:
        UserError: the settings do not fit the model, the data, the checkpoint or the number of processes.
    """

    def __init__(
        self,
        config: Config,
        context: Context,
        data: Prepared,
        checkpoint: Checkpoint | None = None,
        *,
        stop: StopRequest | None = None,
        heartbeat: Callable[..., None] = lambda *doing: None,
        before_save: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.context, self.data, self.monitors = config, context, data, Monitors()
        self.stop, self.heartbeat, self._before_save = stop or StopRequest(), heartbeat, before_save
        saved = checkpoint.state if checkpoint else None
        loader = Loader(
            data.train,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            rank=context.rank,
            world_size=context.world_size,
            seed=config.run.seed,
            fingerprint=data.fingerprint,
            state=LoaderState.from_dict(saved.loader) if saved else None,
        )
        self.loader = Prefetcher(loader, pin=context.device.type == "cuda")
        skeleton = dense_skeleton(config.model, data.tokenizer.vocab_size)
        shapes = layer_shapes(skeleton, config.lowrank)
        values = StartValues(skeleton.initial_values(config.run.seed), shapes, config.lowrank, config.run.seed)
        layout = saved.layout if saved else start_layout(shapes, config.lowrank)
        if not fits(layout, shapes, config.lowrank):
            raise UserError(
                f"{config.run.folder} has {len(layout)} low-rank layers; lowrank.mode {config.lowrank.mode}, targets "
                f"{config.lowrank.targets} makes {len(shapes)}: write those it was trained with, or another run.dir"
            )
        self.engine = build_engine(config, context, skeleton, layout, None if saved else values)
        self.ranks = RankController(self.engine, values, config.lowrank, config.run.seed, config.train.steps)
        self.health = Health(context, config.train, config.optimizer.lr)
        self.parameters_dense = sum(parameter.numel() for parameter in skeleton.parameters())
        start = convert(skeleton, start_layout(shapes, config.lowrank))
        self.parameters_start = sum(parameter.numel() for parameter in start.parameters())
        self.step, self.tokens, self.seconds, self.evaluation_due = 0, 0, 0.0, False
        if checkpoint and saved:
            load_tensors(checkpoint.folder, saved, self.engine)
            self.ranks.load_state_dict(saved.ranks)
            self.health.load_state_dict(saved.health)
            self.step, self.tokens, self.seconds = saved.step, saved.tokens, saved.seconds
            self.evaluation_due = saved.evaluation_due
        self.branched_from = checkpoint.run_folder if checkpoint and not checkpoint.is_in(config.run.folder) else None
        self._resumed_at = self.step if saved and not self.branched_from else None  # a checkpoint is there already
        self.train_loss = saved.train_loss if saved else None
        self.validation: float | None = None
        companions = {"config.yaml": config.to_yaml().encode(), "tokenizer.model": data.tokenizer.model}
        self.profiler = StepProfiler(config.train.profile, config.run.folder / "profile", context)
        self.peak = known_peak(context.device, bf16=config.train.precision == "bf16", tflops=config.train.peak_tflops)
        self.flops = 0  # forward and backward, of all steps since the start of this process
        self._flops_before = saved.flops if saved else 0
        self._peak_memory = 0  # bytes of the GPU, as far as logged
        self._counted: tuple[Layout, int] = ({}, 0)
        self.flops_dense = flops_per_token(skeleton, data.block_length)
        self.writer = CheckpointWriter(config.run.folder, context, config.checkpoint, companions)

    def run(self, monitors: Monitors) -> None:
        """Train to the last step.

        Args:
            monitors: told of everything worth writing down; empty on all processes but the first.

        Raises:
            UserError: the loss is no longer a number, or a checkpoint could not be written.
            Stopped: on request; a checkpoint of the last step is complete.
        """
        self.monitors = monitors
        with closing(self.loader):
            self._run()

    def _run(self) -> None:
        clock = _Clock(self.seconds, self.tokens)
        patience, setting = float(self.config.parallel.timeout_seconds), TIMEOUT
        self._announce()
        if self.branched_from:  # from here on the run needs the other one no more
            self.save()
            self._resumed_at = self.step
        self._between_steps(clock, stop=False)
        longest, settled = 0.0, False
        while self.step < self.config.train.steps:
            is_profiled = self.step + 1 in self.profiler.steps
            if is_profiled and patience < self.config.parallel.timeout_seconds:
                patience, setting = float(self.config.parallel.timeout_seconds), TIMEOUT
            self.heartbeat(f"step {self.step + 1}", patience, setting)
            began = time.perf_counter()
            stop, reshaped = self._train_one_step(clock)
            seconds = time.perf_counter() - began
            self._between_steps(clock, stop)
            # The first step after a start or a reshape may compile; where steps take long, so may the next.
            if not is_profiled:
                longest, settled = max(longest, seconds) if settled else seconds, True
            settled = settled and not reshaped
            patience, setting = max(float(self.config.parallel.step_timeout_seconds), 5 * longest), STEP_TIMEOUT
            if reshaped and patience < self.config.parallel.timeout_seconds:
                patience, setting = float(self.config.parallel.timeout_seconds), TIMEOUT
        self.heartbeat("the end of the run", float(self.config.parallel.timeout_seconds))
        self._refuse_lost()  # no text comes out of such a model, and no summary describes it
        if self.config.eval.sample_tokens:
            self._sample()
        self._summarise()
        self.save()
        self.writer.finish()
        self.writer.close()

    def _train_one_step(self, clock: "_Clock") -> tuple[bool, bool]:
        """One optimizer step with what follows from it; whether anyone asked to stop, and whether layers changed."""
        (batches, verdict, rate), write = self.profiler.run(self.step + 1, self.take_step)
        if write:
            with clock.stopped():
                self.heartbeat(f"writing the trace of step {self.step}", self.config.parallel.timeout_seconds)
                self._tell_profile(write())
        if verdict.reason or verdict.spike is not None:
            self.monitors.write(_notice(verdict, self.step, self.health.skipped))
        if verdict.failed:
            self.writer.finish()  # raises
        before = self.engine.layout
        if self.ranks.due(self.step):
            self.heartbeat(f"the rank event after step {self.step}", self.config.parallel.timeout_seconds)
        # A gradient that is not finite shows no direction.
        gradients = None if verdict.reason else partial(self.engine.factor_gradients, batches, self._tokens_per_step)
        records = self.ranks.after_step(self.step, gradients)
        self.seconds = clock.seconds
        if self._is_due(self.config.log.interval):
            self._log(verdict, rate, clock)
        for record in records:
            self.monitors.write(record)
        self.evaluation_due = self._is_due(self.config.eval.interval) and self.config.eval.interval > 0
        return verdict.stop, self.engine.layout != before

    def take_step(self) -> tuple[Batches, Verdict, float]:
        """The next optimizer step, without what follows from it: its batches, what was found, the learning rate."""
        batches = [(batch.inputs, batch.targets) for batch in self.loader.next_batch()]
        self.flops += self._tokens_per_step * self._flops_per_token
        verdict, rate = self._train_step(batches)
        self.step += 1
        return batches, verdict, rate

    def _between_steps(self, clock: "_Clock", stop: bool) -> None:
        """Validation and checkpoint, where they are due; or the end, where it was asked for."""
        last = self.step == self.config.train.steps
        permanent_due = self._saves(self.config.checkpoint.interval)
        ephemeral_due = self._saves(self.config.checkpoint.ephemeral_interval)
        with clock.stopped():
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

    def _train_step(self, batches: Batches) -> tuple[Verdict, float]:
        """One optimizer step, or none where it would do harm; what was found, and the learning rate."""
        seed_step(self.config.run.seed, self.step, self.context.rank, self.engine.device)
        rate = learning_rate(self.config.schedule, self.config.optimizer.lr, self.step, self.config.train.steps)
        self.ranks.before_step(self.step)
        loss = self.engine.accumulate(batches, self._tokens_per_step)
        norm, mine = self.engine.gradient_norm()
        stop, failed = self.stop.signal is not None, self.writer.failure
        own = self.engine.bad_gradient
        verdict = self.health.judge(loss, norm, mine, own, self._tokens_per_step, stop=stop, failed=failed)
        if verdict.reason:
            self.engine.drop_gradients()
        else:
            self.engine.step(rate, norm)
        self.tokens += self._tokens_per_step
        self.health.count(verdict, self.step + 1)
        return verdict, rate

    @property
    def flops_of_run(self) -> int | None:
        """Floating-point operations of all steps so far, over all processes; None: the run began with a version that
        did not count them."""
        return None if self._flops_before is None else self._flops_before + self.flops

    @property
    def _tokens_per_step(self) -> int:
        return self.config.train.global_batch_size * self.data.block_length

    def _is_due(self, interval: int) -> bool:
        return self.step == self.config.train.steps or (interval > 0 and self.step % interval == 0)

    def _log(self, verdict: Verdict, rate: float, clock: "_Clock") -> None:
        speed, data_wait, flops = clock.rates(self.tokens, self.loader.waited, self.flops)
        if math.isfinite(verdict.loss):
            self.train_loss = verdict.loss
        record: dict[str, Any] = {}
        if self.peak is not None:
            peak = self.peak.flops * self.context.world_size
            record |= {"mfu": flops / peak, "mfu_dense": speed * self.flops_dense / peak}
        if self.engine.device.type == "cuda":
            record["peak_memory"] = torch.cuda.max_memory_allocated(self.engine.device)
            self._peak_memory = max(self._peak_memory, record["peak_memory"])
            torch.cuda.reset_peak_memory_stats(self.engine.device)
        self.monitors.write(
            {
                "kind": "step",
                "step": self.step,
                "loss": verdict.loss,
                "tokens": self.tokens,
                "tokens_per_s": speed,
                "data_wait": data_wait,
                "lr": rate,
                "grad_norm": verdict.norm,
                "parameters": self.engine.parameter_count(),
                **record,
            }
        )

    @property
    def _unsharded(self) -> LanguageModel:
        """The model as it is now, on ``meta``."""
        return convert(self.engine.skeleton, self.engine.layout)

    @property
    def _flops_per_token(self) -> int:
        """Of the model as it is now."""
        layout, flops = self._counted
        if layout is not self.engine.layout:
            flops = flops_per_token(self._unsharded, self.data.block_length)
            self._counted = (self.engine.layout, flops)
        return flops

    def _tell_profile(self, profile: Profile | None) -> None:
        if profile is None:
            return
        held = held_bytes(self._unsharded, cost_setup(self.config, self.context.world_size))
        memory = memory_split(held, profile.most, on_gpu=self.engine.device.type == "cuda")
        self.monitors.write({"kind": "profile", "step": self.step, "trace": str(profile.trace), "memory": memory})

    def _evaluate(self) -> bool:
        """Validate; False where someone asked to stop meanwhile, and it is still to be done."""
        batches = self.config.eval.batches
        self.ranks.before_step(self.step)  # the model as the next step would use it
        loss = validation_loss(
            self.engine,
            self.data.validation,
            batch_size=self.config.train.micro_batch_size,
            max_sequences=batches * self.config.train.global_batch_size if batches else None,
            interrupted=self._anyone_stops,
        )
        if loss is None:
            return False
        self.validation, self.evaluation_due = loss, False
        self.monitors.write({"kind": "eval", "step": self.step, "loss": loss, "perplexity": perplexity(loss)})
        return True

    def _anyone_stops(self) -> bool:
        self.heartbeat(f"the validation after step {self.step}", self.config.parallel.timeout_seconds)
        asked = torch.tensor(float(self.stop.signal is not None), device=self.engine.device)
        self.context.sum(asked)
        return bool(asked)

    def save(self, *, ephemeral: bool = False) -> None:
        """Write a checkpoint of the present step; with ``checkpoint.async`` behind the training.

        Raises:
            UserError: it could not be written, or the model is lost: a checkpoint of it would push out the sound ones.
        """
        self._refuse_lost()
        self.heartbeat(f"saving the checkpoint of step {self.step}", self.config.parallel.timeout_seconds)
        self.context.on_rank_zero(self._before_save)
        state = TrainState(
            step=self.step,
            optimizer_steps=self.engine.optimizer_steps,
            tokens=self.tokens,
            seconds=self.seconds,
            flops=self.flops_of_run,
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
        )
        self.writer.save(self.engine, state, ephemeral=ephemeral)

    def _refuse_lost(self) -> None:
        """Raise the user's mistake in all processes where a weight or a moment of one of them is not finite."""
        lost = self.engine.is_lost()
        self.context.sum(lost)
        if lost:
            raise UserError(
                f"at step {self.step} weights or moments are not finite, so no checkpoint was written; go on from the "
                f"last one with a lower optimizer.lr than {self.config.optimizer.lr} and --allow-change optimizer.lr"
            )

    def _sample(self) -> None:
        self.engine.model.eval()
        prompt = [self.data.tokenizer.eos_id]
        try:
            tokens = sample_tokens(
                self.engine.logits,
                prompt,
                count=self.config.eval.sample_tokens,
                max_seq_len=self.config.model.max_seq_len,
                generator=generator_for(self.config.run.seed, "sample", self.step),
                pad=self.config.train.compile,
            )
        except NotFinite as error:  # in every process; the weights are, so they are saved
            log.warning("warning: no sample: %s", error)
            return
        text = self.data.tokenizer.decode(tokens)
        self.monitors.write({"kind": "sample", "step": self.step, "prompt": "", "text": text})

    def _announce(self) -> None:
        config, context = self.config, self.context
        if self.step:
            source = {"branched_from": str(self.branched_from)} if self.branched_from else {}
            self.monitors.write({"kind": "resume", "step": self.step, "world_size": context.world_size, **source})
        self.monitors.write(
            {
                "kind": "start",
                "step": self.step,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "world_size": context.world_size,
                "engine": self.engine.name,
                "engine_facts": self.engine.facts(),
                "device": _device_name(context.device),
                "model": config.model.name,
                "mode": config.lowrank.mode,
                "parameters": self.engine.parameter_count(),
                "parameters_dense": self.parameters_dense,
                "steps": config.train.steps,
                "seed": config.run.seed,
                "torch": torch.__version__,
                "peak_flops": self.peak.flops if self.peak else None,
                "peak_source": self.peak.source if self.peak else None,
                "unigram_entropy": self.data.unigram_entropy,
                "train_tokens": self.data.train_tokens,
                "validation_tokens": self.data.validation_tokens,
                "ranks": {name: layer.rank for name, layer in self.engine.layout.items()},
                "rank_table": self.ranks.table(),  # after a resume, as it was at the last decision
                "initial_rank": self.config.lowrank.start_rank,
                "threshold": self.config.lowrank.threshold,
                "shrinks": self.ranks.shrinks,
            }
        )

    def _summarise(self) -> None:
        self.monitors.write(
            {
                "kind": "summary",
                "step": self.step,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "flops": self.flops_of_run,
                "peak_memory": self._peak_memory or peak_resident_bytes(),
                "train_loss": self.train_loss,
                "validation_loss": self.validation,
                "perplexity": None if self.validation is None else perplexity(self.validation),
                "unigram_entropy": self.data.unigram_entropy,
                "parameters": self.engine.parameter_count(),
                "parameters_dense": self.parameters_dense,
                "parameters_start": self.parameters_start,
                "ranks": self.ranks.table(),
                "initial_rank": self.config.lowrank.start_rank,
                "threshold": self.config.lowrank.threshold,
                "shrinks": self.ranks.shrinks,
                "seed": self.config.run.seed,
                "world_size": self.context.world_size,
            }
        )


def _notice(verdict: Verdict, step: int, skipped: int) -> dict[str, Any]:
    """The record of a step that was skipped, or of a loss that stands out."""
    if verdict.reason is None:
        return {"kind": "spike", "step": step, "loss": verdict.loss, "deviations": verdict.spike}
    return {
        "kind": "skipped",
        "step": step,
        "reason": verdict.reason,
        "processes": verdict.processes,
        "skipped": skipped,
    }


def _versions() -> dict[str, str]:
    return {"inrank_dist": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def perplexity(loss: float) -> float:
    """``exp(loss)``; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


class _Clock:
    """Training time in seconds; what validation and checkpoints take is left out."""

    def __init__(self, seconds: float, tokens: int) -> None:
        self._began = time.perf_counter() - seconds
        self._mark: tuple[float, tuple[float, ...]] = (seconds, (tokens, 0.0, 0.0))

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def rates(self, *totals: float) -> list[float]:
        """How much each total has grown per second since the last call."""
        now, (then, before) = self.seconds, self._mark
        self._mark = (now, totals)
        return [(total - was) / max(now - then, 1e-9) for total, was in zip(totals, before, strict=True)]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The clock stands still meanwhile."""
        stopped = time.perf_counter()
        yield
        self._began += time.perf_counter() - stopped
