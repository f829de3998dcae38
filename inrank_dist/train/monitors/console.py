"""Console output of a run: a line per logged step, and a progress bar on terminals."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ...runtime.progress import terminal_holders
from ...runtime.words import plural
from .ranks import RankTable, mean
from .text import amount, duration, fixed, number, perplexity_of, size

SMOOTHING = 0.9
"""Weight of the previous value in the smoothed step time."""


class ConsoleMonitor:
    """Writes to ``stream`` (default: standard output; standard error is reserved for errors).

    All lines are plain ASCII except sampled text. A rank is always shown with its null rank. The remaining time is the
    number of remaining steps times the smoothed step time, which includes evaluation, checkpoints and rank events.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        self._total = total_steps
        self._stream = sys.stdout if stream is None else stream
        self._table = RankTable()
        self._entropy: float | None = None
        self._held_out: float | None = None
        self._last: tuple[int, float] | None = None
        self._step_seconds: float | None = None
        self._bar: Progress | None = None
        if self._stream.isatty():
            # No refresh thread during training: the bar is updated when a record arrives.
            self._bar = Progress(
                BarColumn(bar_width=None),
                TextColumn("{task.completed:,}/{task.total:,} steps"),
                TextColumn("{task.fields[left]} left"),
                console=Console(file=self._stream),
                auto_refresh=False,
                transient=True,
                redirect_stderr=sys.stderr.isatty(),
            )
            self._task = self._bar.add_task("train", total=total_steps, left="-")

    def write(self, record: dict[str, Any]) -> None:
        """Print a record; kinds that are not shown only update the state."""
        self._table.update(record)
        kind = record.get("kind")
        if kind == "start":
            self._start(record)
        elif kind == "resume":
            self._restart_clock()
            world = plural(int(number(record.get("world_size")) or 1), "process")
            self._print(f"resumed at {_at(record)} on {world}")
        elif kind == "step":
            self._step(record)
        elif kind == "eval":
            self._held_out = number(record.get("held_out_tokens"))
            self._print(f"{_at(record)}  validation loss {_loss_and_perplexity(record)}{self._on_text()}")
        elif kind == "rank_event":
            self._rank_event(record)
        elif kind in ("updates", "weights"):
            self._print(_spectra(record))
        elif kind == "stable_ranks":
            self._print(_stable_ranks(record))
        elif kind == "profile":
            self._print(_profile(record))
        elif kind == "base_removed":
            self._print(f"{_at(record)}  base removed: the factors now stand alone")
        elif kind == "skipped":
            self._print(_skipped(record))
        elif kind == "spike":
            loss, above = fixed(record.get("loss"), 4), fixed(record.get("deviations"), 1)
            self._print(f"{_at(record)}  loss {loss} is a spike: {above} standard deviations above the last ones")
        elif kind == "sample":
            self._print(f"{_at(record)}  sample: {self._printable(record)}")
        elif kind == "summary":
            self._summary(record)

    def close(self) -> None:
        """Remove the progress bar from the terminal. May be called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            terminal_holders.discard(self)
        if not self._stream.closed:
            self._stream.flush()

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)

    def _start(self, record: dict[str, Any]) -> None:
        self._restart_clock()
        self._entropy = number(record.get("unigram_entropy"))
        world = plural(int(number(record.get("world_size")) or 1), "process")
        model, mode, seed, device, engine, torch = (
            record.get(key, "-") for key in ("model", "mode", "seed", "device", "engine", "torch")
        )
        self._print(f"{model}, {mode}, seed {seed}, on {world} ({device}, {engine}, torch {torch})")
        facts = record.get("engine_facts")
        if isinstance(facts, dict) and facts:
            self._print(f"{engine}: " + ", ".join(f"{name} {fact}" for name, fact in facts.items()))
        if (peak := number(record.get("peak_flops"))) is not None:
            self._print(f"MFU: against {peak / 1e12:.3g} TFLOP/s a device ({record.get('peak_source', '-')})")
        line = f"{amount(record.get('parameters'))} parameters"
        if record.get("parameters_trained") not in (None, record.get("parameters")):
            line += f" ({amount(record.get('parameters_trained'))} trained)"
        if self._table.ranks:
            line += f", {plural(len(self._table.ranks), 'low-rank layer')}, {self._mean_rank()}"
        self._print(line)
        line = (
            f"{_whole(record.get('steps'))} steps, {amount(record.get('train_tokens'))} tokens to train on, "
            f"{amount(record.get('validation_tokens'))} to validate on"
        )
        self._print(line + (f", {self._unigram()}" if self._entropy is not None else ""))
        for source in record.get("sources") or ():
            self._print(
                f"source {source.get('label', '-')}: {100 * (number(source.get('share')) or 0):.1f}% of the sequences, "
                f"{amount(source.get('train_tokens'))} tokens, used {fixed(source.get('epochs'), 2)} times in this run"
            )

    def _step(self, record: dict[str, Any]) -> None:
        step = int(number(record.get("step")) or 0)
        self._tick(step)
        left = "-"
        if self._step_seconds is not None:
            left = duration(max(self._total - step, 0) * self._step_seconds)
        rank = f"  {self._mean_rank(short=True)}" if self._table.ranks else ""
        share = number(record.get("data_wait")) or 0.0
        waited = f"  data {100 * share:.0f}%" if share >= 0.01 else ""
        mfu = number(record.get("mfu"))
        used = f"  MFU {100 * mfu:.1f}%" if mfu is not None else ""
        self._print(
            f"{step:>{len(str(self._total))}d}/{self._total} {100 * step / max(self._total, 1):5.1f}%"
            f"  loss {fixed(record.get('loss'), 4)}  lr {_scientific(record.get('lr'))}"
            f"  grad {fixed(record.get('grad_norm'), 3)}  {fixed(record.get('tokens_per_s'), 0)} tok/s"
            f"{used}{waited}{rank}  ETA {left}"
        )
        if self._bar is not None:
            terminal_holders.add(self)
            self._bar.start()
            self._bar.update(self._task, completed=step, left=left, refresh=True)

    def _tick(self, step: int) -> None:
        now = time.monotonic()
        if self._last is not None and step > self._last[0]:
            seconds = (now - self._last[1]) / (step - self._last[0])
            past = seconds if self._step_seconds is None else self._step_seconds
            self._step_seconds = SMOOTHING * past + (1 - SMOOTHING) * seconds
        self._last = (step, now)

    def _restart_clock(self) -> None:
        self._last = None
        self._step_seconds = None

    def _rank_event(self, record: dict[str, Any]) -> None:
        change = self._table.change(record)
        facts = [f"{change.changed} of {plural(change.total, 'layer')}"]
        if change.found != change.after:
            facts.append(f"found {fixed(change.found, 1)}")
        facts += [f"null rank {fixed(change.null_rank, 1)}", f"explained {fixed(change.explained, 2)}"]
        line = (
            f"{_at(record)}  {change.action}: mean rank {fixed(change.before, 1)} -> {fixed(change.after, 1)}"
            f" ({', '.join(facts)}) in {fixed(change.seconds, 2)} s"
        )
        self._print("; ".join([line, *change.notes]))

    def _summary(self, record: dict[str, Any]) -> None:
        self.close()
        if self._entropy is None:
            self._entropy = number(record.get("unigram_entropy"))
        self._print(
            f"done: {_whole(record.get('step'))} steps, {amount(record.get('tokens'))} tokens in "
            f"{duration(record.get('seconds'))}"
        )
        validation = {"loss": record.get("validation_loss"), "perplexity": record.get("perplexity")}
        self._print(f"  train loss       {fixed(record.get('train_loss'), 4)}  on one batch")
        known = f"  ({self._unigram()})" if self._entropy is not None else ""
        self._print(f"  validation loss  {_loss_and_perplexity(validation)}{self._on_text()}{known}")
        loss = number(record.get("validation_loss"))
        if loss is not None and self._entropy is not None and loss >= self._entropy:
            self._print("                   the model predicts no better than the token frequencies do")
        parameters, dense = number(record.get("parameters")), number(record.get("parameters_dense"))
        share = f" ({parameters / dense:.2f} of dense, {amount(dense)})" if parameters and dense else ""
        self._print(f"  parameters       {amount(record.get('parameters_start'))} -> {amount(parameters)}{share}")
        if self._table.ranks:
            self._print(f"  rank             {self._mean_rank()}, {plural(len(self._table.ranks), 'layer')}")
            for note in self._table.notes():
                self._print(f"                   {note}")

    def _mean_rank(self, short: bool = False) -> str:
        rank, null = mean(self._table.ranks.values()), mean(self._table.null_ranks.values())
        if short:
            pinned = len(self._table.pinned_layers)
            suffix = f", {pinned} pinned" if pinned else ""
            return f"rank {fixed(rank, 1)} (null {fixed(null, 1)}{suffix})"
        known = f"null rank {fixed(null, 1)}" if null is not None else "null rank not measured"
        found = mean(self._table.found.values())
        if null is not None and found != rank:
            known = f"found {fixed(found, 1)}, {known}"
        if (explained := mean(self._table.explained.values())) is not None:
            known += f", explained {fixed(explained, 2)}"
        return f"mean rank {fixed(rank, 1)} ({known})"

    def _on_text(self) -> str:
        return "" if self._held_out is None else f"  on {self._held_out:,.0f} held-out tokens"

    def _unigram(self) -> str:
        return f"unigram entropy {fixed(self._entropy, 4)}, perplexity {fixed(perplexity_of(self._entropy), 0)}"

    def _printable(self, record: dict[str, Any]) -> str:
        """Prompt and text without control characters and characters that the stream cannot encode."""
        prompt = f"[{record['prompt']}] " if record.get("prompt") else ""
        text = f"{prompt}{record.get('text', '')}".replace("\n", "\n    ")
        text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return text.encode(encoding, "replace").decode(encoding)


def _profile(record: dict[str, Any]) -> str:
    memory = record.get("memory") or {}
    split = ", ".join(f"{name} {size(memory.get(name))}" for name in memory if name != "peak")
    return f"{_at(record)}  profiled: {record.get('trace')}; peak memory {size(memory.get('peak'))}: {split}"


def _skipped(record: dict[str, Any]) -> str:
    processes = ", ".join(str(process) for process in record.get("processes") or [])
    where = f" on process {processes}" if processes else ""
    return f"{_at(record)}  skipped: {record.get('reason')}{where} ({_whole(record.get('skipped'))} skipped so far)"


def _loss_and_perplexity(record: dict[str, Any]) -> str:
    line = f"{fixed(record.get('loss'), 4)}  perplexity {fixed(record.get('perplexity'), 2)}"
    sources = record.get("sources")
    if isinstance(sources, dict) and sources:
        line += "  (" + ", ".join(f"{label} {fixed(loss, 4)}" for label, loss in sources.items()) + ")"
    return line


def _spectra(record: dict[str, Any]) -> str:
    layers = (record.get("layers") or {}).values()
    ranks = [
        f"{word} rank {fixed(mean(number(layer.get(f'{word}_rank')) for layer in layers), 1)} "
        f"(null {fixed(mean(number(layer.get(f'null_{word}_rank')) for layer in layers), 1)})"
        for word in ("effective", "stable")
    ]
    what = "cumulative updates" if record.get("kind") == "updates" else "weights"
    return f"{_at(record)}  {what}, mean over {plural(len(layers), 'dense layer')}: {', '.join(ranks)}"


def _stable_ranks(record: dict[str, Any]) -> str:
    layers = (record.get("layers") or {}).values()
    settled = sum(layer.get("settled") is True for layer in layers)
    changes = [change for layer in layers if (change := number(layer.get("change"))) is not None]
    scaled = mean(number(layer.get("scaled_stable_rank")) for layer in layers)
    largest = f", largest change {max(changes):.4f}" if changes else ""
    return (
        f"{_at(record)}  stable ranks: {settled:,} of {plural(len(layers), 'dense layer')} settled, scaled mean "
        f"{fixed(scaled, 1)}{largest} (tolerance {fixed(record.get('tolerance'), 4)})"
    )


def _at(record: dict[str, Any]) -> str:
    return f"step {record.get('step', '-')}"


def _whole(value: Any) -> str:
    return fixed(value, 0)


def _scientific(value: Any) -> str:
    rate = number(value)
    return "-" if rate is None else f"{rate:.2e}"
