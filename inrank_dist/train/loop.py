"""The training loop."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..config import Config
from ..data import Loader, LoaderState, Prepared
from ..engine.context import Context
from ..engine.engine import Batches
from ..errors import UserError
from ..lowrank.convert import convert
from ..lowrank.init import generator_for
from .checkpoint import Checkpoint, TrainState, load_checkpoint, save_checkpoint
from .evaluation import validation_loss
from .monitors import Monitors
from .ranks import RankEvents
from .sampling import sample_tokens
from .schedule import learning_rate
from .start import StartValues, build_engine, dense_skeleton, layer_shapes, start_layout


class Trainer:
    """One run, from its start or from a checkpoint to its last step. All processes do the same.

    Args:
        config: all settings.
        context: with its process group up.
        data: the prepared data.
        checkpoint: where to continue, or None.

    Raises:
        UserError: the settings do not fit the model, the data, the checkpoint or the number of processes.
    """

    def __init__(
        self,
        config: Config,
        context: Context,
        data: Prepared,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.config, self.context, self.data, self.monitors = config, context, data, Monitors()
        saved = checkpoint.state if checkpoint else None
        self.loader = Loader(
            data.train,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            rank=context.rank,
            world_size=context.world_size,
            seed=config.run.seed,
            fingerprint=data.fingerprint,
            state=LoaderState.from_dict(saved.loader) if saved else None,
        )
        skeleton = dense_skeleton(config.model, data.tokenizer.vocab_size)
        shapes = layer_shapes(skeleton, config.lowrank)
        values = StartValues(skeleton, shapes, config.lowrank, config.run.seed)
        layout = saved.layout if saved else start_layout(shapes, config.lowrank)
        self.engine = build_engine(config, context, skeleton, layout, None if saved else values)
        self.ranks = RankEvents(self.engine, values, config.lowrank, config.run.seed, config.train.steps)
        self.parameters_dense = sum(parameter.numel() for parameter in skeleton.parameters())
        start = convert(skeleton, start_layout(shapes, config.lowrank))
        self.parameters_start = sum(parameter.numel() for parameter in start.parameters())
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        if checkpoint and saved:
            load_checkpoint(checkpoint, self.engine)
            self.ranks.load_state_dict(saved.ranks)
            self.step, self.tokens, self.seconds = saved.step, saved.tokens, saved.seconds
        self.train_loss: float | None = None
        self.validation: float | None = None

    def run(self, monitors: Monitors) -> None:
        """Train to the last step.

        Args:
            monitors: told of everything worth writing down; empty on all processes but the first.

        Raises:
            UserError: the loss is no longer a number.
        """
        self.monitors = monitors
        train, checkpoint = self.config.train, self.config.checkpoint
        clock = _Clock(self.seconds, self.tokens)
        self._announce()
        while self.step < train.steps:
            batches = [(batch.inputs, batch.targets) for batch in self.loader.next_batch()]
            loss, norm, rate = self._train_step(batches)
            self.step += 1
            logs = self._is_due(self.config.log.interval)
            saves = checkpoint.interval > 0 and self.step % checkpoint.interval == 0
            if logs or saves or self.ranks.due(self.step):
                self._check_finite(norm)
            records = self.ranks.after_step(self.step, batches, self._tokens_per_step)
            self.seconds = clock.seconds

            if logs:
                self._log(loss, norm, rate, clock)
            for record in records:
                self.monitors.write(record)
            with clock.stopped():
                if self._is_due(self.config.eval.interval) and self.config.eval.interval:
                    self._evaluate()
                if saves and self.step < train.steps:
                    self._save()
        if self.config.eval.sample_tokens:
            self._sample()
        self._summarise()
        self._save()

    def _train_step(self, batches: Batches) -> tuple[torch.Tensor, torch.Tensor, float]:
        """One optimizer step; returns this process's summed loss, the gradient norm and the learning rate."""
        # Dropout depends on seed, step and rank alone, so a resumed run needs no saved random state.
        seed = generator_for(self.config.run.seed, "step", self.step, self.context.rank).initial_seed()
        torch.manual_seed(seed)
        rate = learning_rate(self.config.schedule, self.config.optimizer.lr, self.step, self.config.train.steps)
        self.ranks.before_step(self.step)
        loss = self.engine.accumulate(batches, self._tokens_per_step)
        norm = self.engine.step(rate)
        self.tokens += self._tokens_per_step
        return loss, norm, rate

    @property
    def _tokens_per_step(self) -> int:
        return self.config.train.global_batch_size * self.data.block_length

    def _is_due(self, interval: int) -> bool:
        return self.step == self.config.train.steps or (interval > 0 and self.step % interval == 0)

    def _check_finite(self, norm: torch.Tensor) -> None:
        """Stop before a model that is lost is logged or saved. The norm is the same number on every process."""
        if not bool(torch.isfinite(norm)):
            raise UserError(
                f"at step {self.step} the gradient norm is {float(norm)}; write a lower optimizer.lr than "
                f"{self.config.optimizer.lr} or a longer schedule.warmup_steps, or go on from an earlier checkpoint"
            )

    def _log(self, loss: torch.Tensor, norm: torch.Tensor, rate: float, clock: "_Clock") -> None:
        self.context.sum(loss)
        self.train_loss = float(loss) / self._tokens_per_step
        self.monitors.write(
            {
                "kind": "step",
                "step": self.step,
                "loss": self.train_loss,
                "tokens": self.tokens,
                "tokens_per_s": clock.rate(self.tokens),
                "lr": rate,
                "grad_norm": float(norm),
                "parameters": self.engine.parameter_count(),
            }
        )

    def _evaluate(self) -> None:
        batches = self.config.eval.batches
        self.ranks.before_step(self.step)  # the model as the next step would use it
        self.validation = validation_loss(
            self.engine,
            self.data.validation,
            batch_size=self.config.train.micro_batch_size,
            max_sequences=batches * self.config.train.global_batch_size if batches else None,
        )
        self.monitors.write(
            {"kind": "eval", "step": self.step, "loss": self.validation, "perplexity": perplexity(self.validation)}
        )

    def _save(self) -> None:
        state = TrainState(
            step=self.step,
            tokens=self.tokens,
            seconds=self.seconds,
            layout=self.engine.layout,
            ranks=self.ranks.state_dict(),
            loader=self.loader.state().to_dict(),
            vocab_size=self.data.tokenizer.vocab_size,
            fingerprint=self.data.fingerprint,
            unigram_entropy=self.data.unigram_entropy,
        )
        save_checkpoint(
            self.config.run.folder,
            self.engine,
            state,
            config=self.config.to_yaml(),
            save_tokenizer=self.data.tokenizer.save,
            keep=self.config.checkpoint.keep,
        )

    def _sample(self) -> None:
        self.engine.model.eval()
        prompt = [self.data.tokenizer.eos_id]
        tokens = sample_tokens(
            self.engine.logits,
            prompt,
            count=self.config.eval.sample_tokens,
            max_seq_len=self.config.model.max_seq_len,
            generator=generator_for(self.config.run.seed, "sample", self.step),
            pad=self.config.train.compile,
        )
        text = self.data.tokenizer.decode(tokens)
        self.monitors.write({"kind": "sample", "step": self.step, "prompt": "", "text": text})

    def _announce(self) -> None:
        config, context = self.config, self.context
        if self.step:
            self.monitors.write({"kind": "resume", "step": self.step, "world_size": context.world_size})
        self.monitors.write(
            {
                "kind": "start",
                "step": self.step,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "world_size": context.world_size,
                "engine": self.engine.name,
                "device": _device_name(context.device),
                "model": config.model.name,
                "mode": config.lowrank.mode,
                "parameters": self.engine.parameter_count(),
                "parameters_dense": self.parameters_dense,
                "steps": config.train.steps,
                "seed": config.run.seed,
                "torch": torch.__version__,
                "unigram_entropy": self.data.unigram_entropy,
                "train_tokens": self.data.train_tokens,
                "validation_tokens": self.data.validation_tokens,
                "ranks": {name: layer.rank for name, layer in self.engine.layout.items()},
            }
        )

    def _summarise(self) -> None:
        shapes = self.ranks.shapes
        self.monitors.write(
            {
                "kind": "summary",
                "step": self.step,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "train_loss": self.train_loss,
                "validation_loss": self.validation,
                "perplexity": None if self.validation is None else perplexity(self.validation),
                "unigram_entropy": self.data.unigram_entropy,
                "parameters": self.engine.parameter_count(),
                "parameters_dense": self.parameters_dense,
                "parameters_start": self.parameters_start,
                "ranks": {
                    name: {
                        "rank": layer.rank,
                        "null_rank": self.ranks.null.of(shapes[name]) if self.ranks.null.checks else None,
                        "shape": list(shapes[name]),
                    }
                    for name, layer in self.engine.layout.items()
                },
                "seed": self.config.run.seed,
                "world_size": self.context.world_size,
            }
        )


def perplexity(loss: float) -> float:
    """``exp(loss)``; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


class _Clock:
    """Training time in seconds; what validation and checkpoints take is left out."""

    def __init__(self, seconds: float, tokens: int) -> None:
        self._began = time.perf_counter() - seconds
        self._mark = (seconds, tokens)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def rate(self, tokens: int) -> float:
        """Tokens per second since the last call."""
        now, (then, before) = self.seconds, self._mark
        self._mark = (now, tokens)
        return (tokens - before) / max(now - then, 1e-9)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The clock stands still meanwhile."""
        stopped = time.perf_counter()
        yield
        self._began += time.perf_counter() - stopped
