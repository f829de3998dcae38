"""``train.profile``, MFU and the split of the memory."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from runs import small_config, train

from inrank_dist.engine.cost import Held
from inrank_dist.lowrank.convert import LayerLayout, convert, find_targets
from inrank_dist.models import flops_per_token
from inrank_dist.runtime.context import Context
from inrank_dist.train import speed
from inrank_dist.train.building import dense_skeleton
from inrank_dist.train.monitors import ConsoleMonitor
from inrank_dist.train.profiling import StepProfiler, memory_split

CPU = torch.device("cpu")


def test_chosen_steps_leave_a_trace_and_change_nothing(corpus: Path, tmp_path: Path) -> None:
    plain, _ = train(small_config(corpus))
    config = small_config(corpus, train__profile="[3,26]", run__dir=tmp_path / "run")
    recorder, _ = train(config)
    assert recorder.losses() == plain.losses()
    records = [record for record in recorder.records if record["kind"] == "profile"]
    assert [record["step"] for record in records] == [3, 26]
    files = sorted((tmp_path / "run" / "profile").iterdir())
    assert [file.name for file in files] == [f"step-{step:08d}-process-0.json.gz" for step in (3, 26)]
    assert [record["trace"] for record in records] == [str(file) for file in files]
    for file in files:
        names = {event["name"] for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}
        assert {"aten::mm", "aten::_fused_adamw_"} <= names
    growing, frozen = (record["memory"] for record in records)
    for memory in (growing, frozen):
        assert memory["peak"] == sum(memory[part] for part in ("parameters", "gradients", "moments", "activations"))
        assert min(memory.values()) > 0
        assert memory["moments"] == 2 * memory["gradients"]
    assert growing["parameters"] > growing["gradients"]  # the base takes none
    assert frozen["parameters"] == frozen["gradients"]


def test_every_process_leaves_a_trace(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    config = small_config(
        corpus, train__profile="[2]", train__steps=3, lowrank__mode="full", run__dir=tmp_path, parallel__engine="fsdp"
    )
    pool.run("runs:train_in_worker", config, world_size=2)
    assert [file.name for file in sorted((tmp_path / "profile").iterdir())] == [
        f"step-00000002-process-{rank}.json.gz" for rank in (0, 1)
    ]


def test_what_fails_while_it_is_profiled_is_raised_and_the_next_is_not_in_its_way(tmp_path: Path) -> None:
    profiler = StepProfiler([1], tmp_path / "profile", Context())

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        profiler.run(1, fail)
    result, write = profiler.run(1, lambda: torch.ones(3, 3) @ torch.ones(3, 3))
    assert result[0, 0] == 3
    assert write is not None
    profile = write()
    assert profile is not None and profile.trace.exists()
    assert profiler.run(2, lambda: 6) == (6, None)


def test_a_trace_that_cannot_be_written_costs_no_step(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file is where the folder should be."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("")
    recorder, _ = train(small_config(corpus, train__profile="[3]", run__dir=tmp_path / "run"))
    assert len(recorder.losses()) == 30
    assert not [record for record in recorder.records if record["kind"] == "profile"]
    (warning,) = [each.message for each in caplog.records if "profiled" in each.message]
    assert "step 3 was profiled but" in warning and "could not be written" in warning


def test_a_profiled_step_may_take_long(corpus: Path, tmp_path: Path) -> None:
    """It is not taken for one that hangs, nor is it the measure of those after it."""
    told: list[tuple[str, float]] = []

    def hook(trainer: Any) -> None:
        trainer.heartbeat = lambda doing, patience, *_: told.append((doing, patience))

    config = small_config(corpus, train__profile="[10]", run__dir=tmp_path, parallel__step_timeout_seconds=7)
    train(config, hook=hook)
    patience = dict(told)
    assert patience["step 10"] == patience["writing the trace of step 10"] == 600
    assert patience["step 12"] == patience["step 7"] == 7


def test_memory_is_split_from_the_peak() -> None:
    held = Held(parameters=100, gradients=40, moments=80)
    assert memory_split(held, 90, on_gpu=False)["activations"] == 50
    on_gpu = memory_split(held, 1000, on_gpu=True)
    assert (on_gpu["peak"], on_gpu["activations"]) == (1000, 780)
    offloaded = memory_split(Held(100, 40, 80, host=120), 1000, on_gpu=True)
    assert (offloaded["peak"], offloaded["activations"]) == (1120, 900)


def test_the_profile_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    memory = {"peak": 3 * 2**30, "parameters": 2**20, "gradients": 2**20, "moments": 2**21, "activations": 5 * 2**20}
    ConsoleMonitor(10).write({"kind": "profile", "step": 4, "trace": "run/profile/x.json.gz", "memory": memory})
    out = capsys.readouterr().out
    assert "step 4  profiled: run/profile/x.json.gz; peak memory 3.00 GiB: parameters 1.0 MiB, gradients 1.0 MiB" in out
    assert "moments 2.0 MiB, activations 5.0 MiB" in out


def test_mfu_is_that_of_the_steps_that_were_logged(corpus: Path) -> None:
    """The line at the freeze is of steps that still had the base."""
    config = small_config(corpus, train__peak_tflops=1, log__interval=24)
    recorder, _ = train(config)
    line = next(record for record in recorder.records if record["kind"] == "step")
    assert line["step"] == 24
    assert line["mfu"] > 0.8 * line["mfu_dense"]  # about half of it without the base


def test_mfu_counts_the_arithmetic_that_is_done_and_that_of_the_dense_model(corpus: Path) -> None:
    """With a peak of one TFLOP/s the share is the rate itself."""
    config = small_config(corpus, train__peak_tflops=1)
    recorder, table = train(config)
    skeleton = dense_skeleton(config.model, 301)
    layout = {name: LayerLayout(rank, modes, base) for name, (rank, modes, base) in table.items()}
    last = [record for record in recorder.records if record["kind"] == "step"][-1]
    dense = flops_per_token(skeleton, 16)
    assert last["mfu"] == pytest.approx(last["tokens_per_s"] * flops_per_token(convert(skeleton, layout), 16) / 1e12)
    assert last["mfu_dense"] == pytest.approx(last["tokens_per_s"] * dense / 1e12)
    start = next(record for record in recorder.records if record["kind"] == "start")
    assert (start["peak_flops"], start["peak_source"]) == (1e12, "train.peak_tflops")
    # While a base is there, more is done than in the dense model.
    first = next(record for record in recorder.records if record["kind"] == "step")
    growing = {name: LayerLayout(1, 3, True) for name in find_targets(skeleton, ["all"])}
    assert first["mfu"] / first["mfu_dense"] == pytest.approx(flops_per_token(convert(skeleton, growing), 16) / dense)


def test_peak_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert speed.known_peak(CPU, bf16=False, tflops=3.0) == (3e12, "train.peak_tflops")
    assert speed.known_peak(CPU, bf16=False) is None
    measured = speed.peak_of(CPU, bf16=False)
    assert 1e9 < measured.flops < 1e14
    assert "measured" in measured.source and "float32" in measured.source
    assert speed.peak_of(CPU, bf16=False) is measured, "measured once"
    gpu = torch.device("cuda", 0)
    for name, tflops in (("NVIDIA H200", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert speed.peak_of(gpu, bf16=True).flops == tflops * 1e12
    monkeypatch.setattr(speed, "_measured", lambda device, dtype: speed.Peak(1.0, "measured"))
    for name in ("NVIDIA RTX A4000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Tesla V100-SXM2-16GB"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert speed.peak_of(gpu, bf16=True).source == "measured"
    assert speed.peak_of(gpu, bf16=False).source == "measured"  # of fp32 no vendor's figure


def test_on_cpu_no_mfu_is_told_unless_its_peak_is_given(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured before the run, it would depend on what else the machine does just then."""
    recorder, _ = train(small_config(corpus, train__peak_tflops=None))
    start = next(record for record in recorder.records if record["kind"] == "start")
    assert start["peak_flops"] is None
    console = ConsoleMonitor(24)
    for record in recorder.records:
        assert "mfu" not in record and "mfu_dense" not in record
        console.write(record)
    assert "loss" in (out := capsys.readouterr().out) and "MFU" not in out
