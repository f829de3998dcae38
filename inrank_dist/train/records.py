"""Records of a run: start, steps, rank events and summary."""

import math
from typing import TYPE_CHECKING, Any

import torch

from .callbacks import Callback
from .health import Verdict
from .memory import peak_resident_bytes, resident_bytes
from .speed import Peak

if TYPE_CHECKING:
    from ..data import Prepared
    from .loop import Trainer


class Records(Callback):
    """Callback that writes records to the trainer's monitors, and through them to ``metrics.jsonl``.

    Args:
        peak: peak floating-point operations per second of the device of a process, or None if unknown.
        parameters_dense: number of parameters of the dense model.
        parameters_start: number of parameters of the model before the first step.
    """

    def __init__(self, peak: Peak | None, parameters_dense: int, parameters_start: int) -> None:
        self.peak, self.parameters_dense, self.parameters_start = peak, parameters_dense, parameters_start
        self._peak_memory = 0  # bytes on the GPU, up to the last logged step

    def on_start(self, trainer: "Trainer") -> None:
        config, context, data, engine = trainer.config, trainer.context, trainer.data, trainer.engine
        if trainer.step:
            source = {"branched_from": str(trainer.branched_from)} if trainer.branched_from else {}
            resume = {"kind": "resume", "step": trainer.step, "world_size": context.world_size}
            trainer.monitors.write({**resume, **source})
        trainer.monitors.write(
            {
                "kind": "start",
                "step": trainer.step,
                "world_size": context.world_size,
                "engine": engine.name,
                "engine_facts": engine.facts(),
                "device": _device_name(context.device),
                "model": config.model.name,
                "mode": config.lowrank.mode,
                "parameters": engine.parameter_count(),
                "parameters_trained": engine.trained_count(),
                "parameters_dense": self.parameters_dense,
                "steps": config.train.steps,
                "seed": config.run.seed,
                "torch": torch.__version__,
                "peak_flops": self.peak.flops if self.peak else None,
                "peak_source": self.peak.source if self.peak else None,
                "unigram_entropy": data.unigram_entropy,
                "data_fingerprint": data.fingerprint,
                "train_tokens": data.train_tokens,
                "validation_tokens": data.validation_tokens,
                "ranks": {name: layer.rank for name, layer in engine.layout.items()},
                "rank_table": trainer.ranks.table(),  # after a resume, the table of the last decision
                "initial_rank": config.lowrank.start_rank,
                "threshold": config.lowrank.threshold,
                "shrinks": trainer.ranks.shrinks,
                **_sources(data, config.train.steps * config.train.global_batch_size),
            }
        )

    def on_step_end(self, trainer: "Trainer", verdict: Verdict, rate: float, records: list[dict[str, Any]]) -> None:
        if trainer.is_due(trainer.config.log.interval):
            trainer.monitors.write(self._step(trainer, verdict, rate))
        for record in records:
            trainer.monitors.write(record)

    def _step(self, trainer: "Trainer", verdict: Verdict, rate: float) -> dict[str, Any]:
        flops, device = trainer.flops, trainer.engine.device
        speed, data_wait, per_second = trainer.clock.rates(trainer.tokens, trainer.loader.waited, flops.since_start)
        record: dict[str, Any] = {}
        if self.peak is not None:
            peak = self.peak.flops * trainer.context.world_size
            record |= {"mfu": per_second / peak, "mfu_dense": speed * flops.dense_per_token / peak}
        if device.type == "cuda":
            record["peak_memory"] = torch.cuda.max_memory_allocated(device)
            self._peak_memory = max(self._peak_memory, record["peak_memory"])
            torch.cuda.reset_peak_memory_stats(device)
        else:
            record["resident_memory"] = resident_bytes()
        return {
            "kind": "step",
            "step": trainer.step,
            "loss": verdict.loss,
            "tokens": trainer.tokens,
            "seconds": trainer.seconds,
            "flops": flops.of_run,
            "tokens_per_s": speed,
            "data_wait": data_wait,
            "lr": rate,
            "grad_norm": verdict.norm,
            "parameters": trainer.engine.parameter_count(),
            **record,
        }

    def on_end(self, trainer: "Trainer") -> None:
        config = trainer.config
        trainer.monitors.write(
            {
                "kind": "summary",
                "step": trainer.step,
                "tokens": trainer.tokens,
                "seconds": trainer.seconds,
                "flops": trainer.flops.of_run,
                "peak_memory": self._peak_memory or peak_resident_bytes(),
                "train_loss": trainer.train_loss,
                "validation_loss": trainer.validation,
                **loss_figures(trainer.validation, trainer.data.bytes_per_token),
                "unigram_entropy": trainer.data.unigram_entropy,
                "parameters": trainer.engine.parameter_count(),
                "parameters_dense": self.parameters_dense,
                "parameters_start": self.parameters_start,
                "ranks": trainer.ranks.table(),
                "initial_rank": config.lowrank.start_rank,
                "threshold": config.lowrank.threshold,
                "shrinks": trainer.ranks.shrinks,
                "seed": config.run.seed,
                "world_size": trainer.context.world_size,
            }
        )


def _sources(data: "Prepared", sequences: int) -> dict[str, list[dict[str, Any]]]:
    """Return the sources of a mixture, with the number of epochs over each in a run of ``sequences`` sequences."""
    sources = [
        {
            "label": source.label,
            "share": source.share,
            "train_tokens": source.data.train_tokens,
            "epochs": sequences * source.share / len(source.data.train),
        }
        for source in data.sources
    ]
    return {"sources": sources} if sources else {}


def notice(verdict: Verdict, step: int, skipped: int) -> dict[str, Any]:
    """Return the record of a skipped step or a loss spike."""
    if verdict.reason is None:
        return {"kind": "spike", "step": step, "loss": verdict.loss, "deviations": verdict.spike}
    return {
        "kind": "skipped",
        "step": step,
        "reason": verdict.reason,
        "processes": verdict.processes,
        "skipped": skipped,
    }


def loss_figures(loss: float | None, bytes_per_token: float | None) -> dict[str, float | None]:
    """Return the perplexity and, if the bytes of the text are known, the bits per byte.

    Bits per byte are comparable between tokenizers: ``loss / ln(2) / bytes_per_token``.

    Args:
        loss: in nats per token, or None if there was no validation.
        bytes_per_token: bytes of the validation text per token.
    """
    figures = {"perplexity": None if loss is None else perplexity(loss)}
    if loss is not None and bytes_per_token:
        figures["bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return figures


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``, or infinity if it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
