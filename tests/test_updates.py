"""Spectra of the cumulative updates of dense layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from runs import short_config, small_config, train
from safetensors.torch import load_file

from inrank_dist.commands.main import main
from inrank_dist.config import load_config
from inrank_dist.lowrank.criterion import stable_rank
from inrank_dist.lowrank.division import ALONE
from inrank_dist.lowrank.spectrum import dense_singular_values
from inrank_dist.lowrank.updates import recorded_indices, weight_spectra
from inrank_dist.runtime.errors import UserError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 4)])
def test_singular_values_are_those_of_the_matrix(shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    torch.testing.assert_close(dense_singular_values(matrix), torch.linalg.svdvals(matrix), rtol=1e-10, atol=1e-12)
    assert dense_singular_values(matrix * float("nan")).isnan().all()


def test_update_spectra_alone() -> None:
    start, now = random(6, 4), random(6, 4, seed=1)
    found = weight_spectra(lambda name: (0, now), {"a": (6, 4)}, ALONE, lambda name: start)
    torch.testing.assert_close(found["a"], torch.linalg.svdvals(now - start), rtol=1e-10, atol=1e-12)


def test_stable_rank() -> None:
    assert stable_rank(torch.tensor([2.0, 2.0, 2.0])) == 3.0
    assert stable_rank(torch.tensor([2.0, 1.0, 1.0])) == 1.5
    assert stable_rank(torch.zeros(3)) == 0.0


def test_recorded_indices_are_few() -> None:
    assert recorded_indices(5) == [0, 1, 2, 3, 4]
    indices = recorded_indices(4096)
    assert indices[:64] == list(range(64)) and indices[-1] == 4095 and len(indices) == 88
    assert indices == sorted(set(indices)) and {127, 255, 511, 1023} < set(indices)
    assert recorded_indices(64)[-1] == 63 and recorded_indices(65)[-1] == 64


def tracked(corpus: Path, **changes: Any) -> Any:
    return short_config(corpus, lowrank__track_updates=4, **changes)


def updates(records: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {record["step"]: record["layers"] for record in records if record["kind"] == "updates"}


def test_a_full_rank_run_measures_its_updates(corpus: Path, tmp_path: Path) -> None:
    config = tracked(corpus, run__dir=tmp_path / "run", lowrank__mode="full", train__steps=6)
    recorder, _ = train(config)
    found = updates(recorder.records)
    assert list(found) == [4, 6], "every interval and at the end"
    assert len(found[6]) == 12
    weights = load_file(next((tmp_path / "run/checkpoints").glob("*6/*.safetensors")))
    from inrank_dist.train.building import dense_skeleton

    initial = dense_skeleton(config.model, 301).initial_values(config.run.seed)
    for name, layer in found[6].items():
        weight = next(tensor for key, tensor in weights.items() if key.endswith(f"{name}.weight"))
        difference = weight.double() - initial.parameter(f"{name}.weight").double()
        sigma = torch.linalg.svdvals(difference)
        assert layer["sigma"] == pytest.approx(sigma.tolist(), rel=1e-5, abs=1e-9)
        assert layer["indices"] == list(range(1, 33)) and layer["shape"] == list(weight.shape)
        assert layer["effective_rank"] == pytest.approx(float(sigma.sum() / sigma[0]))
        assert layer["stable_rank"] == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2))
        assert layer["stable_rank"] < layer["null_stable_rank"]


def test_tracking_changes_nothing_and_follows_a_resume(corpus: Path, tmp_path: Path) -> None:
    """W(0) is drawn from the seed again, so the checkpoint needs no copy."""
    changes = {"lowrank__mode": "full", "train__steps": 8, "checkpoint__interval": 4, "checkpoint__keep": 9}
    plain, _ = train(short_config(corpus, run__dir=tmp_path / "plain", **changes))
    straight, _ = train(tracked(corpus, run__dir=tmp_path / "run", **changes))
    assert straight.losses() == plain.losses()
    for path in (tmp_path / "run/checkpoints").glob("*8"):
        (path / "state.json").rename(path / "hidden")
    resumed, _ = train(tracked(corpus, run__dir=tmp_path / "run", **changes), resume=True)
    assert updates(resumed.records)[8] == updates(straight.records)[8]


def test_layers_are_tracked_while_they_are_dense(corpus: Path, tmp_path: Path) -> None:
    config = small_config(
        corpus,
        run__dir=tmp_path,
        train__steps=12,
        lowrank__mode="fixed",
        lowrank__base="none",
        lowrank__dense_fraction=0.5,
        lowrank__track_updates=2,
    )
    assert list(updates(train(config)[0].records)) == [2, 4]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "world_size"), [("fsdp", 3), ("ddp", 2), ("zero3", 2), ("zero1", 2)])
def test_sharded_spectra_are_those_of_one_process(
    corpus: Path, tmp_path: Path, pool: Pool, engine: str, world_size: int
) -> None:
    changes = {"lowrank__mode": "full", "train__steps": 4, "train__micro_batch_size": 1}
    changes["train__global_batch_size"] = 6
    alone = updates(train(tracked(corpus, run__dir=tmp_path / "alone", **changes))[0].records)[4]
    config = tracked(corpus, run__dir=tmp_path / "run", parallel__engine=engine, **changes)
    result = pool.run("runs:train_in_worker", config, world_size=world_size)
    found = updates(result[0].records)[4]
    assert found.keys() == alone.keys()
    for name, layer in found.items():
        top = alone[name]["sigma"][0]
        assert layer["sigma"] == pytest.approx(alone[name]["sigma"], rel=1e-5, abs=1e-5 * top)
        assert layer["null_stable_rank"] == alone[name]["null_stable_rank"]
    assert not updates(result[1].records), "process 0 alone writes"


def test_settings() -> None:
    model = ["--model.num_layers=1", "--model.num_heads=1", "--model.hidden_size=8", "--model.max_seq_len=8"]
    full = ["--lowrank.mode=full", "--lowrank.targets=[all]"]
    config, given = load_config(None, [*model, *full, "--lowrank.track_updates=5"])
    assert not config.without_effect(given)
    config, given = load_config(None, [*model, *full])
    assert config.without_effect(given) == ["lowrank.targets has no effect: lowrank.mode is full"]
    config, given = load_config(None, [*model, "--lowrank.track_updates=5", "--tokenizer.pattern=gpt2"])
    assert config.without_effect(given) == [
        "lowrank.track_updates has no effect: lowrank.dense_fraction is 0, so no target is ever dense",
        "tokenizer.pattern has no effect: tokenizer.path is null",
    ]
    with pytest.raises(UserError, match=r"lowrank\.track_updates is -1; write a number of steps, or 0"):
        load_config(None, [*model, "--lowrank.track_updates=-1"])
    with pytest.raises(UserError, match=r"lowrank\.track_updates is 5 but model\.init_from is x; W\(0\) is drawn"):
        loaded = ["--model.init_from=x", "--tokenizer.path=t", "--lowrank.init=loaded"]
        load_config(None, [*model, *full, *loaded, "--lowrank.track_updates=5"])


def test_the_report_and_the_console_show_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from inrank_dist.train.monitors import ConsoleMonitor

    layer = {"shape": [8, 4], "indices": [1, 2], "sigma": [3.0, 1.0], "effective_rank": 1.333, "stable_rank": 1.111}
    layer |= {"null_effective_rank": 2.5, "null_stable_rank": 2.0}
    records: list[dict[str, Any]] = [{"kind": "start", "step": 0, "steps": 4}]
    records += [{"kind": "updates", "step": step, "layers": {"a<b>": layer}, "seconds": 0.1} for step in (2, 4)]
    monitor = ConsoleMonitor(4)
    monitor.write(records[1])
    line = capsys.readouterr().out.strip()
    assert line == (
        "step 2  cumulative updates, mean over 1 dense layer: effective rank 1.3 (null 2.5), stable rank 1.1 (null 2.0)"
    )
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "config.yaml").write_text("run: {name: x}\n")
    main(["report", "--run", str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert "Cumulative updates" in page and "a&lt;b&gt;" in page and "a<b>" not in page
    assert "1.3 (2.5)" in page and ">2nd<" in page


def test_the_learning_rate_is_scaled_once_layers_are_factored(corpus: Path, tmp_path: Path) -> None:
    dense: dict[str, Any] = {"lowrank__mode": "fixed", "lowrank__base": "none", "lowrank__dense_fraction": 0.5}
    plain, _ = train(short_config(corpus, run__dir=tmp_path / "plain", **dense))
    halved, _ = train(short_config(corpus, run__dir=tmp_path / "half", lowrank__factorized_lr_scale=0.5, **dense))
    rates = [[each["lr"] for each in run.records if each["kind"] == "step"] for run in (plain, halved)]
    assert rates[1] == [*rates[0][:6], *(rate / 2 for rate in rates[0][6:])]
    assert plain.losses()[:7] == halved.losses()[:7] and plain.losses()[7] != halved.losses()[7]
    with pytest.raises(UserError, match=r"lowrank\.factorized_lr_scale is 0\.0; write a number above 0"):
        short_config(corpus, lowrank__factorized_lr_scale=0, **dense)
