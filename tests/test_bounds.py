"""Settings that no program should swallow whole: one line, at once, in little memory."""

import subprocess
import sys
from pathlib import Path

import pytest
from runs import Fails, the_error

from inrank_dist.config import load_config
from inrank_dist.runtime import yaml_text
from inrank_dist.runtime.errors import UserError

MODEL = "model:\n  num_layers: 2\n  num_heads: 2\n  hidden_size: 32\n  max_seq_len: 16\n"


def doubled(times: int, brackets: str = "[*{0}, *{0}]") -> str:
    """Aliases that double a value so many times."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} {brackets.format(f'a{i - 1}')}" for i in range(1, times + 1)]
    return "\n".join(lines)


HOSTILE = {
    "deep brackets": ("run: " + "[" * 5_000 + "]" * 5_000, "nested more than 50 deep"),
    "deep mappings": ("run: " + "{a: " * 5_000 + "1" + "}" * 5_000, "nested more than 50 deep"),
    "deep lines": ("\n".join(" " * i + "a:" for i in range(1_000)), "nested more than 50 deep"),
    "unclosed": ("run: " + "[" * 1_000_000, "nested more than 50 deep"),
    "list in itself": (MODEL + "data: &d\n  paths: &p [*p]", "line 7, column 10: a value holds itself"),
    "mapping in itself": (MODEL + "parallel:\n  deepspeed: &d {a: *d}", "a value holds itself"),
    "key in itself": ("? &k [*k]\n: 1", "a value holds itself"),
    "doubled lists": (doubled(60), "stands for more than 100000 values"),
    "doubled mappings": (doubled(60, "{{x: *{0}, y: *{0}}}"), "stands for more than 100000 values"),
    "doubled merges": (doubled(60, "{{<<: [*{0}, *{0}]}}").replace("[x]", "{x: 1}"), "more than 100000 values"),
    "large": ("#" * (yaml_text.MAX_BYTES + 1), "is larger than 1048576 bytes"),
}


@pytest.mark.parametrize("text, says", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "config.yaml")
    assert says in str(error.value) and str(error.value).startswith(f"{tmp_path}/config.yaml ")
    assert len(str(error.value)) < 300


def test_endless_files_end(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is larger than"):
        load_config("/dev/zero")


@pytest.mark.parametrize("value", ["{a: &a [*a]}", "[" * 5_000, "{a: " * 5_000 + "1" + "}" * 5_000, "&a [*a]"])
@pytest.mark.parametrize("key", ["parallel.deepspeed", "lowrank.targets", "train.profile", "train.steps"])
def test_hostile_overrides(tmp_path: Path, key: str, value: str) -> None:
    (tmp_path / "config.yaml").write_text(MODEL)
    with pytest.raises(UserError, match=f"{key} is .*; write"):
        load_config(tmp_path / "config.yaml", [f"--{key}={value}"])


def test_ordinary_aliases_stay(tmp_path: Path) -> None:
    text = MODEL.replace("num_layers: 2", "num_layers: &two 2").replace("num_heads: 2", "num_heads: *two")
    text += "lowrank: &same\n  initial_rank: 2\nparallel:\n"
    text += "  deepspeed: {zero_optimization: &x {b: 1}, comms_logger: *x, flops_profiler: {<<: *x}}\n"
    (tmp_path / "config.yaml").write_text(text)
    config, _ = load_config(tmp_path / "config.yaml")
    assert (config.model.num_heads, config.parallel.deepspeed) == (
        2,
        {key: {"b": 1} for key in ("zero_optimization", "comms_logger", "flops_profiler")},
    )
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml")[0] == config


TOO_MUCH = {
    "model.num_layers": 300_000,
    "model.hidden_size": 10**9,
    "model.intermediate_size": 10**9,
    "model.max_seq_len": 10**12,
    "tokenizer.vocab_size": 10**15,
    "train.global_batch_size": 10**12,
    "train.steps": 10**30,
    "eval.sample_tokens": 10**9,
    "run.seed": 2**64,
    "checkpoint.interval": 10**400,
}


@pytest.mark.parametrize("key, value", TOO_MUCH.items())
def test_what_is_too_much(tmp_path: Path, fails: Fails, key: str, value: int) -> None:
    (tmp_path / "config.yaml").write_text(MODEL)
    error = fails("plan", "--config", tmp_path / "config.yaml", f"--{key}={value}")
    assert error.startswith(f"{key} is ") and "; write " in error and "at most" in error


@pytest.mark.parametrize("key, value", [("num_heads", 32), ("num_layers", 40)])
def test_what_is_much_is_fine(tmp_path: Path, key: str, value: int) -> None:
    (tmp_path / "config.yaml").write_text(MODEL)
    load_config(tmp_path / "config.yaml", [f"--model.{key}={value}"])


MEASURED = """
import sys
from inrank_dist.commands.main import main
from inrank_dist.train.memory import peak_resident_bytes

status = main(sys.argv[1:])
print(peak_resident_bytes())
sys.exit(status)
"""


@pytest.mark.slow
def test_too_many_layers_take_no_memory(tmp_path: Path) -> None:
    """Its settings are read before anything is built from them."""
    (tmp_path / "config.yaml").write_text(MODEL.replace("num_layers: 2", "num_layers: 300000"))
    argv = [sys.executable, "-c", MEASURED, "train", "--dry-run", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert "model.num_layers is 300000" in the_error(done.returncode, done.stderr)
    assert int(done.stdout) < 1 << 30
