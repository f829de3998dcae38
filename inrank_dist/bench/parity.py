"""Checks that every way to train gives the same result here as a single CPU process, in whole runs of a small model.

A run of thirty steps includes two growth events and the freeze, so it covers a device's forward and backward passes,
optimizers, moments, rank decisions and rank events. Text, model and initial values are the same; losses differ by
rounding only.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from ..config import load_config
from ..runtime.errors import error_line
from ..runtime.progress import counted
from ..train.checkpoint import named_folders, step_of
from ..train.monitors.jsonl import read_metrics

STEPS = 30

SMALL = {
    "model.num_layers": "2",
    "model.num_heads": "2",
    "model.hidden_size": "64",
    "model.max_seq_len": "32",
    "lowrank.targets": "[all]",
    "lowrank.initial_rank": "1",
    "lowrank.buffer": "2",
    "lowrank.threshold": "0.995",
    "lowrank.interval": "8",
    "lowrank.warmup_steps": "24",
    "lowrank.multiple_of": "1",
    "train.steps": str(STEPS),
    "train.global_batch_size": "8",
    "train.micro_batch_size": "4",
    "optimizer.lr": "3e-3",
    "data.source": "files",
    "data.validation_fraction": "0.2",
    "tokenizer.vocab_size": "301",
    "checkpoint.interval": "0",
    "eval.interval": "0",
    "eval.sample_tokens": "0",
    "log.interval": "1",
}

FLOAT32, BF16 = 1e-5, 2e-2
"""Largest relative difference of a loss from the CPU's. On an H200, 5e-7 and 3e-3 were observed."""

TEXT = "the rank of a factor grows when the modes it has no longer explain what was learned so far"


@dataclass(frozen=True)
class Case:
    """A way to train.

    Attributes:
        settings: in addition to ``SMALL``.
        reference: settings of the CPU run, in addition to ``SMALL``.
        limit: largest relative difference of a loss.
        resumes: whether to truncate the run after step 18 and resume it.
        gpu: whether it needs a GPU.
    """

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    reference: Mapping[str, str] = field(default_factory=dict)
    limit: float = FLOAT32
    resumes: bool = False
    gpu: bool = False


def _engine(name: str, **more: str) -> dict[str, str]:
    return {"parallel.engine": name, **{key.replace("__", "."): value for key, value in more.items()}}


_FULL = {"lowrank.mode": "full", "optimizer.name": "muon"}
_FACTORS = {"optimizer.name": "lora_muon"}
_CROSSING = {"model.layer_crossing": "true"}
_DEEP = {"lowrank.depth": "3"}
_DENSE_FIRST = {
    "lowrank.mode": "fixed",
    "lowrank.base": "none",
    "lowrank.dense_fraction": "0.5",
    "lowrank.dense_until": "stable_rank",
    "lowrank.interval": "3",
    "lowrank.track_weights": "5",
}
_DOCUMENTS = {
    "model.mask_documents": "true",
    "model.restart_positions": "true",
    "data.document_separator": "learned",
}
_HF = {
    "model.name": "hf",
    "model.config": "{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, "
    "num_attention_heads: 2}",
    "model.num_layers": "null",
    "model.num_heads": "null",
    "model.hidden_size": "null",
}

CASES = (
    Case("local"),
    Case("ddp", _engine("ddp")),
    Case("fsdp", _engine("fsdp")),
    *(Case(f"zero{stage}", _engine(f"zero{stage}")) for stage in range(4)),
    Case("fsdp, accumulated whole", _engine("fsdp", parallel__reduce_each_micro_batch="false")),
    Case("resumed", {"checkpoint.interval": "6"}, resumes=True),
    Case("checkpoints behind", {"checkpoint.interval": "5", "checkpoint.async": "true"}),
    Case("growth along the gradient", {"lowrank.growth_init": "gradient"}, {"lowrank.growth_init": "gradient"}),
    Case("dense first, fsdp", {**_DENSE_FIRST, **_engine("fsdp")}, _DENSE_FIRST),
    Case("depth 3, fsdp", {**_DEEP, **_engine("fsdp")}, _DEEP),
    Case("depth 3, compiled", {**_DEEP, "train.compile": "true"}, _DEEP),
    Case("documents apart", _DOCUMENTS, _DOCUMENTS),
    Case("documents apart, compiled", {**_DOCUMENTS, "train.compile": "true"}, _DOCUMENTS),
    Case("hf, fsdp", {**_HF, **_engine("fsdp")}, _HF),
    Case("muon, fsdp", {**_FULL, **_engine("fsdp")}, _FULL),
    Case("lora_muon, fsdp", {**_FACTORS, **_engine("fsdp")}, _FACTORS),
    Case("activation checkpointing", {"train.activation_checkpointing": "true"}),
    Case("compiled", {"train.compile": "true"}),
    Case("layer crossing, compiled, fsdp", {**_CROSSING, "train.compile": "true", **_engine("fsdp")}, _CROSSING),
    Case("compiled, CUDA graphs", {"train.compile": "true", "train.cuda_graph": "true", "train.micro_batch_size": "8"},
         gpu=True),
    Case("zero2, optimizer on the CPU", _engine("zero2", parallel__offload_optimizer="true"), gpu=True),
    Case("bf16", {"train.precision": "bf16"}, limit=BF16),
    Case("bf16, fsdp", {"train.precision": "bf16", **_engine("fsdp")}, limit=BF16),
)  # fmt: skip


@dataclass(frozen=True)
class Parity:
    """Result of a case.

    Attributes:
        difference: largest relative difference of a step's loss from the CPU's; nan if the run failed.
        same_ranks: whether all rank events gave the same ranks.
        seconds: duration of the run, including startup.
        failure: the last line of output, if the run failed.
    """

    case: Case
    difference: float = float("nan")
    same_ranks: bool = False
    seconds: float = float("nan")
    failure: str = ""

    @property
    def holds(self) -> bool:
        """Whether the result is the same as on the CPU. With bf16 the ranks may differ."""
        return self.difference <= self.case.limit and (self.same_ranks or self.case.limit == BF16)


@dataclass(frozen=True)
class _Trace:
    losses: list[float]
    ranks: list[dict[str, int]]


class Bench:
    """Runs cases in subprocesses.

    Args:
        folder: an empty folder for the runs.
        timeout: of each run, in seconds.
        workers: number of runs at a time; they share the GPU.
    """

    def __init__(self, folder: Path, timeout: float = 300.0, workers: int = 1) -> None:
        self._folder, self._timeout, self._workers = folder, timeout, workers
        self._references: dict[str, _Trace | str] = {}
        self._locks: dict[str, threading.Lock] = {}
        write_corpus(folder / "corpus")

    def measure(self, cases: tuple[Case, ...]) -> Iterator[Parity]:
        """Yield the results of the cases in their order, each as soon as it is known."""
        self._locks = {_key(case): threading.Lock() for case in cases}
        with ThreadPoolExecutor(self._workers) as pool:
            yield from counted(pool.map(self._measure, cases), "training", len(cases), unit="cases")

    def _measure(self, case: Case) -> Parity:
        key = _key(case)
        with self._locks[key]:
            if key not in self._references:
                settings = {**case.reference, "parallel.engine": "local"}
                self._references[key] = self._train(f"cpu-{list(self._locks).index(key)}", settings, on_cpu=True)
        reference = self._references[key]
        if isinstance(reference, str):
            return Parity(case, failure=f"on the CPU: {reference}")
        start, name = time.monotonic(), case.name.replace(",", "").replace(" ", "-")
        trace = self._train(name, case.settings)
        if case.resumes and not isinstance(trace, str):
            truncate(self._folder / name, 18)
            trace = self._train(name, case.settings)
        if isinstance(trace, str):
            return Parity(case, failure=trace)
        pairs = zip(trace.losses, reference.losses, strict=True)
        difference = max(abs(loss / expected - 1) for loss, expected in pairs)
        return Parity(case, difference, trace.ranks == reference.ranks, time.monotonic() - start)

    def _train(self, name: str, settings: Mapping[str, str], *, on_cpu: bool = False) -> "_Trace | str":
        """Losses and ranks of a run, or the last line of output if it failed."""
        run = self._folder / name
        overrides = {
            **SMALL,
            "data.paths": f"[{self._folder}/corpus/*.txt]",
            "data.cache_dir": str(self._folder / "cache"),
            **settings,
            "run.dir": str(run),
        }
        file = self._folder / f"{name}.yaml"
        file.write_text(load_config(None, [f"--{key}={value}" for key, value in overrides.items()])[0].to_yaml())
        threads = max((os.cpu_count() or 1) // self._workers, 1)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        environment |= {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
        argv = [sys.executable, "-m", "inrank_dist.launcher.torchrun", "-n", "1", "train", "--config", str(file)]
        try:
            done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=self._timeout)
        except subprocess.TimeoutExpired:
            return f"not done within {self._timeout:g} s"
        if done.returncode:
            return error_line(f"{done.stdout}\n{done.stderr}") or f"status {done.returncode}"
        records = read_metrics(run / "metrics.jsonl")
        events = [record["layers"] for record in records if record["kind"] == "rank_event"]
        ranks = [{name: layer["to"] for name, layer in layers.items()} for layers in events]
        return _Trace([record["loss"] for record in records if record["kind"] == "step"], ranks)


def _key(case: Case) -> str:
    """Cases with the same key have the same reference."""
    return json.dumps(dict(case.reference), sort_keys=True)


def is_supported(case: Case) -> bool:
    """Whether this machine and installation support a case: some need a GPU, DeepSpeed or transformers."""
    libraries = {
        "deepspeed": case.settings.get("parallel.engine", "").startswith("zero"),
        "transformers": case.settings.get("model.name") == "hf",
    }
    missing = [name for name, needed in libraries.items() if needed and find_spec(name) is None]
    return (not case.gpu or torch.cuda.is_available()) and not missing


def truncate(run: Path, step: int) -> None:
    """Remove the checkpoints after a step, as if the job had been killed just after that step's checkpoint."""
    for folder in named_folders(run):
        if step_of(folder) > step:
            shutil.rmtree(folder)


def write_corpus(folder: Path) -> None:
    """Twenty short documents, the same on every machine."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, words = torch.Generator().manual_seed(0), TEXT.split()
    for index in range(20):
        picks = torch.randint(len(words), (400,), generator=generator).tolist()
        (folder / f"{index:02d}.txt").write_text(" ".join(words[pick] for pick in picks))
