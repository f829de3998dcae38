"""Text from a model: any console, any temperature, and logits that are nothing to draw from."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Fails, small_config, train
from torch import Tensor

from inrank_dist.commands.main import main
from inrank_dist.runtime.errors import UserError
from inrank_dist.train.checkpoint import list_checkpoints, step_of
from inrank_dist.train.loop import Trainer
from inrank_dist.train.sampling import NotFinite, sample_tokens

LOGITS = torch.tensor([1.0, 3.0, -2.0, 2.999, 0.5])


def tokens(logits: Tensor, temperature: float, top_k: int = 0) -> list[int]:
    return sample_tokens(
        lambda ids: logits.expand(1, ids.shape[1], -1),
        [0],
        count=50,
        max_seq_len=8,
        generator=torch.Generator().manual_seed(0),
        temperature=temperature,
        top_k=top_k,
    )


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-320, 1e-300, 1e-46, 1e-38, 1e-6])
@pytest.mark.parametrize("top_k", [0, 2])
def test_tiny_temperatures_take_the_likeliest_token(temperature: float, top_k: int) -> None:
    assert tokens(LOGITS, temperature, top_k) == [1] * 50


def test_a_temperature_divides_the_logits() -> None:
    drawn = torch.tensor(tokens(LOGITS, 2.0)).bincount(minlength=5)
    assert (drawn[[0, 1, 3, 4]] > 0).all()
    assert set(tokens(LOGITS, 1e300)) == {0, 1, 2, 3, 4}
    assert set(tokens(LOGITS, 0.1, top_k=2)) == {1, 3}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_finite_are_told(bad: float, temperature: float) -> None:
    logits = LOGITS.clone()
    logits[2] = bad
    with pytest.raises(NotFinite, match="after 1 tokens are not finite"):
        tokens(logits, temperature)


def overflowing(after: int, value: float) -> Any:
    """A hook that puts a value into the embedding at the last step, after the last look at the loss."""

    def hook(trainer: Trainer) -> None:
        step = trainer.engine.step

        def overflows(lr: float, norm: Tensor) -> None:
            step(lr, norm)
            if trainer.step == after:
                trainer.engine.parameters()["tok_embed.weight"].data[:] = value

        trainer.engine.step = overflows  # type: ignore[method-assign]

    return hook


def test_a_model_that_is_lost_in_its_last_step_draws_no_sample(corpus: Path, tmp_path: Path) -> None:
    config = small_config(corpus, run__dir=tmp_path, checkpoint__interval=10, eval__sample_tokens=8)
    with pytest.raises(UserError, match="at step 30 weights or moments are not finite, so no checkpoint was written"):
        train(config, hook=overflowing(29, float("inf")))
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [10, 20]


def test_a_model_whose_logits_overflow_is_saved_without_a_sample(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, fails: Fails
) -> None:
    config = small_config(corpus, run__dir=tmp_path, eval__sample_tokens=8)
    recorder, _ = train(config, hook=overflowing(29, 3e38))
    kinds = [record["kind"] for record in recorder.records]
    assert "sample" not in kinds and kinds[-1] == "summary"
    assert "warning: no sample: the model's logits after 1 tokens are not finite" in caplog.text
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [30]
    assert "take an earlier checkpoint" in fails("generate", "--run", tmp_path)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    train(small_config(corpus, run__dir=folder))
    return folder


def test_tiny_temperatures_on_the_command_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for temperature in ("0", "1e-320", "1e-400"):
        assert main(["generate", "--run", str(run), "--tokens", "8", "--temperature", temperature]) == 0
        outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_console(run: Path, encoding: str) -> None:
    """A prompt with what the console lacks."""
    argv = [sys.executable, "-m", "inrank_dist", "generate", "--run", run, "--tokens", "4", "--prompt", "é—"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(argv, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    shown = {"ascii": "\\xe9\\u2014", "latin-1": "é\\u2014", "utf-8": "é—"}[encoding]
    assert shown in done.stdout.decode(encoding) and not done.stderr
