"""Layers that are dense until their stable ranks have settled (Cuttlefish, arXiv 2305.02538), and what is measured."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from pool import Pool
from runs import short_config, tensor_bytes, train
from safetensors.torch import load_file
from sharing import nightly, slow
from test_checkpoint import cut
from torch import nn

import inrank_dist as inrank
from inrank_dist.commands.main import main
from inrank_dist.config import Config
from inrank_dist.lowrank.criterion import explained_ratio
from inrank_dist.lowrank.division import ALONE, Processes
from inrank_dist.lowrank.spectrum import DenseRows
from inrank_dist.lowrank.updates import weight_spectra
from inrank_dist.method.rank_method import METHODS
from inrank_dist.method.settings import LowRankSettings
from inrank_dist.method.stable_rank import StableRanks
from inrank_dist.runtime.agreement import Disagreement
from inrank_dist.runtime.errors import UserError
from inrank_dist.train.monitors import ConsoleMonitor
from inrank_dist.train.monitors.scalars import Curves

FOLLOWED: dict[str, Any] = {
    "lowrank__mode": "fixed",
    "lowrank__base": "none",
    "lowrank__dense_fraction": 0.8,
    "lowrank__dense_until": "stable_rank",
    "lowrank__interval": 1,
    "lowrank__stable_rank_window": 2,
    "lowrank__stable_rank_tolerance": 0.03,
    "lowrank__factorized_lr_scale": 0.5,
    "lowrank__max_rank_fraction": 1.0,
}
"""Of 12 steps. The stable ranks settle after step 5, where a rate that halves is seen at once."""


def measured(records: list[dict[str, Any]], kind: str = "stable_ranks") -> dict[int, dict[str, Any]]:
    return {record["step"]: record["layers"] for record in records if record["kind"] == kind}


def events(records: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for record in records if record["kind"] == "rank_event"}


def test_a_layer_settles_when_its_stable_rank_changes_little_and_stays_settled() -> None:
    ranks = StableRanks({"a": (40, 20), "b": (10, 30)}, tolerance=0.026, window=2)
    for a, b in ((5.0, 4.0), (4.0, 4.0), (3.9, 4.0), (3.7, 2.0), (3.65, 2.04)):
        ranks.add({"a": a, "b": b})
        assert ranks.all_settled == (a == 3.65)
    # b settled after two changes of zero and stays settled, whatever it does; a, whose last two are 0.2 and 0.05,
    # only once their mean is 0.025 of the 5 at the start.
    assert ranks.settled == {"a", "b"} and ranks.change("b") > 0.2
    assert ranks.scaled("a") == pytest.approx(20 * 3.65 / 5) and ranks.rank("a") == 15
    assert ranks.scaled("b") == pytest.approx(10 * 2.04 / 4) and ranks.rank("b") == 6
    again = StableRanks(ranks.shapes, tolerance=0.026, window=2)
    again.load_state_dict(json.loads(json.dumps(ranks.state_dict())))
    assert vars(again) == vars(ranks)


def test_a_stable_rank_above_that_of_the_initialisation_is_full_rank() -> None:
    ranks = StableRanks({"a": (8, 6)}, tolerance=0.1, window=1)
    ranks.add({"a": 2.0})
    assert ranks.rank("a") == 6 and ranks.change("a") is None
    ranks.add({"a": 3.0})
    assert ranks.scaled("a") == 9 and ranks.rank("a") == 6


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6), (7, 1)])
def test_spectra_of_weights_are_those_of_the_matrix_on_three_uneven_shards(shape: tuple[int, int]) -> None:
    """A layer with ``in <= out`` is summed as a Gram matrix, so no process needs the whole of it."""
    weight = reference.normal(*shape, 1)
    expected = torch.linalg.svdvals(weight.double())
    alone = weight_spectra(lambda name: (0, weight), {"a": shape}, ALONE)["a"]
    torch.testing.assert_close(alone, expected, rtol=1e-9, atol=1e-12)
    processes, rows = reference.Processes(3), reference.cut(shape[0], 3, 2)

    def process(index: int, all_reduce: Any) -> torch.Tensor:
        held = rows[index]
        there = Processes(index, 3, all_reduce)
        return weight_spectra(lambda name: (held.start, weight[held]), {"a": shape}, there)["a"]

    for found in processes.run(process):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    first = 4 * shape[1] * (shape[1] + 1) if shape[1] <= shape[0] else 4 * shape[0] * shape[1]
    assert processes.calls == [first, 8 * min(shape)]


def test_layers_are_factored_once_all_have_settled_at_their_scaled_stable_ranks(corpus: Path, tmp_path: Path) -> None:
    config = short_config(corpus, run__dir=tmp_path / "run", **FOLLOWED)
    config.checkpoint.interval, config.checkpoint.keep = 1, 20
    recorder, table = train(config)
    found, (event,) = measured(recorder.records), events(recorder.records).items()
    step, record = event
    assert record["action"] == "factorise" and 2 < step < 9, "before the last step that it may be"
    assert list(found) == list(range(1, step + 1)), "every interval while dense"
    assert all(layer["settled"] for layer in found[step].values())
    assert not all(layer["settled"] for layer in found[step - 1].values())
    # The stable ranks and the rule again, from the weights in the checkpoints.
    initial = dense_values(config)
    history: dict[str, list[float]] = {name: [reference.stable_rank(initial(name))] for name in table}
    for each in range(1, step):
        weights = load_file(next((tmp_path / "run/checkpoints").glob(f"*{each:08}/*.safetensors")))
        for name, values in history.items():
            weight = next(tensor for key, tensor in weights.items() if key.endswith(f"{name}.weight"))
            values.append(reference.stable_rank(weight))
            assert found[each][name]["stable_rank"] == pytest.approx(values[-1], rel=1e-6)
            assert found[each][name]["scaled_stable_rank"] == pytest.approx(
                min(weight.shape) * values[-1] / values[0], rel=1e-6
            )
            changes = [abs(b - a) / values[0] for a, b in itertools.pairwise(values)][-2:]
            assert found[each][name]["change"] == pytest.approx(sum(changes) / len(changes), rel=1e-4, abs=1e-9)
    for name, (rank, modes, base) in table.items():
        scaled = found[step][name]["scaled_stable_rank"]
        assert rank == modes == min(-(-scaled // 1), 32) and not base
    rates = {record["step"]: record["lr"] for record in recorder.records if record["kind"] == "step"}
    plain = {each: rate for each, rate in learning_rates(corpus).items()}
    assert all(rates[each] == plain[each] * (0.5 if each > step else 1) for each in rates)


def dense_values(config: Any) -> Any:
    from inrank_dist.train.building import dense_skeleton

    values = dense_skeleton(config.model, 301).initial_values(config.run.seed)
    return lambda name: values.parameter(f"{name}.weight")


def learning_rates(corpus: Path) -> dict[int, float]:
    from inrank_dist.train.schedule import planned_rate

    config = short_config(corpus, lowrank__mode="full")
    return {step + 1: planned_rate(config, "lr", step, factored=True) for step in range(12)}


@pytest.mark.parametrize(
    ("changes", "action"),
    [
        ({"lowrank__mode": "efficient", "lowrank__threshold": 0.8}, "freeze"),
        slow({"lowrank__mode": "efficient", "lowrank__threshold": 0.8, "lowrank__freeze_step": 11}, "factorise"),
        slow({"lowrank__mode": "inrank", "lowrank__threshold": 0.8}, "factorise"),
    ],
)
def test_where_ranks_grow_the_stable_ranks_say_only_when(corpus: Path, changes: dict[str, Any], action: str) -> None:
    recorder, table = train(short_config(corpus, **FOLLOWED | changes))
    found, rank_events = measured(recorder.records), events(recorder.records)
    step = min(rank_events)
    assert rank_events[step]["action"] == action and 2 < step < 9 and max(found) == step
    ranks = {name: layer["to"] for name, layer in rank_events[step]["layers"].items()}
    assert ranks.keys() == table.keys()
    assert any(rank != -(-found[step][name]["scaled_stable_rank"] // 1) for name, rank in ranks.items())
    if action == "factorise":  # growth goes on before the last step that the layers may be dense
        checks = [record["step"] for record in recorder.records if record["kind"] == "rank_check"]
        assert checks[:3] == [step, step + 1, step + 2]


def test_what_never_settles_is_factored_at_the_last_step_that_it_may_be_dense(corpus: Path) -> None:
    changes = {"lowrank__stable_rank_tolerance": 0, "lowrank__dense_fraction": 0.5, "lowrank__interval": 4}
    recorder, table = train(short_config(corpus, **FOLLOWED | changes | {"lowrank__max_rank_fraction": 0.25}))
    assert list(measured(recorder.records)) == [4, 6] and list(events(recorder.records)) == [6]
    assert {rank for rank, _, _ in table.values()} == {8}, "at most max_rank_fraction of 32"
    rounded = {"lowrank__multiple_of": 4, "lowrank__max_rank_fraction": 1.0}
    _, table = train(short_config(corpus, **FOLLOWED | changes | rounded))
    assert all(rank % 4 == 0 for rank, _, _ in table.values())


SIGMA = torch.tensor([4.0, 2.0, 2.0, 1.0, 0.5, 0.5], dtype=torch.float64)
"""Squares 16, 4, 4, 1, 1/4, 1/4 of 25.5: shares 0.63, 0.78, 0.94, 0.98."""


@pytest.mark.parametrize(
    ("changes", "rank"),
    [
        ({"initial_rank": 3}, 3),
        ({"initial_energy": 0.62}, 1),
        ({"initial_energy": 0.9}, 3),
        ({"initial_energy": 0.95}, 4),
        ({"initial_energy": 0.95, "multiple_of": 3}, 6),
        ({"initial_energy": 0.95, "max_rank_fraction": 0.5}, 3),
        ({"initial_energy": 0.62, "threshold": 0.99, "criterion": "variance"}, 1),
        ({"initial_budget": 0.49}, 1),  # 6 x 12 = 72 parameters; 18 a mode
        ({"initial_budget": 0.75}, 3),
        ({"initial_budget": 0.75, "dense_until": "stable_rank"}, 3),
        ({"initial_energy": 0.62, "dense_until": "stable_rank"}, 1),
        ({"dense_until": "stable_rank"}, 5),  # 6 * 3.2 / 4, rounded up
        ({"dense_until": "stable_rank", "multiple_of": 2}, 6),
        ({"dense_until": "stable_rank", "max_rank_fraction": 0.7}, 4),
    ],
)
def test_ranks_of_mode_fixed_after_dense_steps(changes: dict[str, Any], rank: int) -> None:
    given = {"max_rank_fraction": 1.0} | changes
    settings = LowRankSettings(mode="fixed", base="none", dense_fraction=0.5, **given)
    method = METHODS["fixed"](settings, {"a": (12, 6)}, 0, 10, 8)
    if method.stable_ranks:
        method.stable_ranks.add({"a": 4.0})
        method.stable_ranks.add({"a": 3.2})
    decision = method.decide("a", SIGMA, None, "factorise")
    assert decision.after == rank
    share = explained_ratio(SIGMA, 6, settings.criterion)
    assert decision.reached == pytest.approx(float(share[rank]))


@pytest.mark.parametrize("dense_fraction", [0, 0.5])
def test_a_budget_is_what_each_layer_has(corpus: Path, dense_fraction: float) -> None:
    changes = {"lowrank__mode": "fixed", "lowrank__base": "none", "lowrank__dense_fraction": dense_fraction}
    config = short_config(corpus, **changes, lowrank__initial_budget=0.3, train__steps=4, schedule__warmup_steps=1)
    recorder, table = train(config)
    shapes = {"up": (128, 32), "down": (32, 128)}
    for name, (rank, modes, _) in table.items():
        out, in_ = shapes.get(name.rpartition(".")[2], (32, 32))
        assert rank == modes and rank * (out + in_) <= 0.3 * out * in_ < (rank + 1) * (out + in_)
    assert len({rank for rank, _, _ in table.values()}) == 2
    assert bool(events(recorder.records)) == bool(dense_fraction)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_until": "stable_rank"}, "lowrank.dense_until is stable_rank but lowrank.dense_fraction is 0; write"),
        ({"dense_until": "soon"}, "lowrank.dense_until is soon; write one of fraction, stable_rank"),
        ({"stable_rank_tolerance": -1}, "lowrank.stable_rank_tolerance is -1; write 0 or a positive number"),
        ({"stable_rank_window": 0}, "lowrank.stable_rank_window is 0; write a whole number of at least 1"),
        (
            {"initial_energy": 0.9},
            "lowrank.init is orthogonal; write lowrank.init: loaded, or leave out initial_energy",
        ),
        ({"initial_energy": 0.9, "dense_fraction": 0.5, "mode": "efficient"}, "write lowrank.mode: fixed, or leave"),
        ({"initial_budget": 0.2, "mode": "efficient"}, "write lowrank.mode: fixed, or leave out initial_budget"),
        ({"initial_budget": 0}, "lowrank.initial_budget is 0; write a share above 0 and at most 1, like 0.25"),
        ({"initial_budget": 0.2, "initial_energy": 0.9, "dense_fraction": 0.5}, "leave out one of them"),
        ({"initial_budget": 0.2, "init": "loaded"}, "write lowrank.initial_energy, or lowrank.initial_rank"),
        ({"track_weights": -1}, "lowrank.track_weights is -1; write a number of steps, or 0 for never"),
    ],
)
def test_what_cannot_work_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        LowRankSettings(**{"mode": "fixed", "base": "none"} | changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def idle(**changes: Any) -> set[str]:
    return {name for name, _ in LowRankSettings(base="none", **changes).without_effect()}


def test_settings_without_effect() -> None:
    dense: dict[str, Any] = {"mode": "fixed", "dense_fraction": 0.5}
    assert {"interval", "multiple_of", "max_rank_fraction", "stable_rank_window"} <= idle(**dense)
    used = {"interval", "multiple_of", "max_rank_fraction", "stable_rank_tolerance", "stable_rank_window"}
    assert not used & idle(**dense, dense_until="stable_rank")
    assert "initial_rank" in idle(**dense, dense_until="stable_rank")
    assert not {"multiple_of", "max_rank_fraction"} & idle(**dense, initial_energy=0.9)
    assert "interval" in idle(**dense, initial_energy=0.9)
    assert {"initial_rank", "multiple_of"} <= idle(**dense, initial_budget=0.2)
    assert "interval" not in idle(**dense, initial_budget=0.2, dense_until="stable_rank")
    assert "track_weights" in idle(mode="fixed") and "track_weights" not in idle(**dense)
    full = {name for name, _ in LowRankSettings(mode="full", track_weights=5).without_effect()}
    assert not {"targets", "track_weights"} & full and "track_updates" in full


def test_a_budget_below_rank_1_is_refused(corpus: Path) -> None:
    changes = {"lowrank__mode": "fixed", "lowrank__base": "none", "lowrank__initial_budget": 0.03}
    with pytest.raises(UserError, match=r"lowrank\.initial_budget is 0\.03 but rank 1 of blocks\.0\..* takes 0\.062 "):
        train(short_config(corpus, **changes))


@pytest.mark.parametrize("step", [slow(3), "last dense", "first factored", slow(9)])
def test_a_run_resumes_exactly_around_the_factorisation(corpus: Path, tmp_path: Path, step: int | str) -> None:
    config = short_config(corpus, run__dir=tmp_path / "straight", **FOLLOWED)
    config.checkpoint.interval, config.checkpoint.keep = 1, 20
    straight, table = train(config)
    (factored,) = events(straight.records)
    at = {"last dense": factored - 1, "first factored": factored}.get(step, step)  # type: ignore[call-overload]
    config.run.dir = str(cut(tmp_path / "straight", tmp_path / "run", at))
    resumed, again = train(config, resume=True)
    assert resumed.losses() == straight.losses()[at:] and again == table
    expected = {each: layers for each, layers in measured(straight.records).items() if each > at}
    assert measured(resumed.records) == expected
    assert tensor_bytes(tmp_path / "run") == tensor_bytes(tmp_path / "straight")


def test_a_checkpoint_without_stable_ranks_of_the_start_is_refused(corpus: Path, tmp_path: Path) -> None:
    config = short_config(corpus, run__dir=tmp_path / "run", **FOLLOWED, checkpoint__keep=20)
    config.lowrank.dense_until, config.checkpoint.interval = "fraction", 1
    train(config)
    config.run.dir = str(cut(tmp_path / "run", tmp_path / "early", 3))
    config.lowrank.dense_until = "stable_rank"
    with pytest.raises(UserError, match=r"no stable ranks of the initialisation; write lowrank\.dense_until: fraction"):
        train(config, resume=True)
    config.run.dir = str(cut(tmp_path / "run", tmp_path / "late", 11))  # factored: they are not needed any more
    assert train(config, resume=True)[0].losses()


@pytest.mark.parametrize(
    ("engine", "world_size"),
    [("fsdp", 3), slow("ddp", 2), slow("zero1", 2), nightly("zero2", 2), slow("zero3", 2)],
)
def test_every_engine_decides_the_same(corpus: Path, tmp_path: Path, pool: Pool, engine: str, world_size: int) -> None:
    changes = FOLLOWED | {"train__micro_batch_size": 1, "train__global_batch_size": 6, "lowrank__track_weights": 3}
    alone, table = train(short_config(corpus, run__dir=tmp_path / "alone", **changes))
    config = short_config(corpus, run__dir=tmp_path / "run", parallel__engine=engine, **changes)
    result = pool.run("runs:train_in_worker", config, world_size=world_size)
    for process in result:
        assert process.table == table
    for kind in ("stable_ranks", "weights"):
        found, expected = measured(result[0].records, kind), measured(alone.records, kind)
        assert found.keys() == expected.keys() and found
        for step, layers in found.items():
            for name, layer in layers.items():
                assert layer["stable_rank"] == pytest.approx(expected[step][name]["stable_rank"], rel=1e-5)
    assert result[0].losses() == pytest.approx(alone.losses(), abs=1e-4)


def lie(config: Config) -> str:
    """A run in which process 1 measures another stable rank than the others."""
    from inrank_dist.method import stable_rank

    honest = stable_rank.dense_spectra
    if os.environ["RANK"] == "1":
        stable_rank.dense_spectra = lambda *given: {name: s + s[0] for name, s in honest(*given).items()}
    try:
        train(config)
    except Disagreement as error:
        return str(error)
    finally:
        stable_rank.dense_spectra = honest
    return "no disagreement"


def test_processes_that_measure_differently_stop_before_anything_is_touched(corpus: Path, pool: Pool) -> None:
    config = short_config(corpus, **FOLLOWED, parallel__engine="fsdp")
    for said in pool.run("test_stable_rank:lie", config, world_size=2):
        assert said.startswith("processes disagree on the stable ranks of: blocks.0.")


def test_a_weight_that_starts_at_zero_is_refused() -> None:
    class Holder:
        processes = ALONE

        def placement(self, layer: str) -> Any:
            return self

        def counted_rows(self, size: int) -> tuple[int, int]:
            return 0, size

        def dense_factors(self, layers: list[str]) -> dict[str, Any]:
            return {"a": DenseRows(weight, 0, 4)}

    ranks = StableRanks({"a": (6, 4)}, 0.1, 2)
    for weight, message in (  # noqa: B007
        (torch.zeros(6, 4), "the weight of a starts at zero, so it has no stable rank; write lowrank.dense_until: fr"),
        (torch.full((6, 4), torch.nan), "at step 0 the weight of a is not finite; write a lower optimizer.lr"),
    ):
        with pytest.raises(UserError, match=message):
            ranks.measure(Holder(), 0)  # type: ignore[arg-type]


def test_weights_of_a_full_rank_run_are_measured(corpus: Path, tmp_path: Path) -> None:
    config = short_config(
        corpus, run__dir=tmp_path / "run", lowrank__mode="full", lowrank__track_weights=4, train__steps=6
    )
    recorder, _ = train(config)
    found, initial = measured(recorder.records, "weights"), dense_values(config)
    assert list(found) == [0, 4, 6], "at the start, every interval, and at the end"
    weights = load_file(next((tmp_path / "run/checkpoints").glob("*6/*.safetensors")))
    for step, value in ((0, initial), (6, lambda name: weights[f"{name}.weight"])):
        for name, layer in found[step].items():
            sigma = torch.linalg.svdvals(value(name).double())
            assert layer["sigma"] == pytest.approx(sigma.tolist(), rel=1e-4, abs=1e-7)
            assert layer["effective_rank"] == pytest.approx(float(sigma.sum() / sigma[0]), rel=1e-6)
            assert layer["stable_rank"] == pytest.approx(reference.stable_rank(value(name)), rel=1e-6)
    plain, _ = train(short_config(corpus, run__dir=tmp_path / "plain", lowrank__mode="full", train__steps=6))
    assert plain.losses() == recorder.losses()


def test_the_console_the_report_and_tensorboard_show_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = {"shape": [8, 4], "indices": [1, 2], "sigma": [3.0, 1.0], "effective_rank": 1.333, "stable_rank": 1.111}
    layer |= {"null_effective_rank": 2.5, "null_stable_rank": 2.0}
    stable = {"stable_rank": 1.1, "scaled_stable_rank": 3.3, "change": 0.0125, "settled": True}
    records: list[dict[str, Any]] = [
        {"kind": "start", "step": 0, "steps": 4},
        {"kind": "weights", "step": 2, "layers": {"a<b>": layer}, "seconds": 0.1},
        {"kind": "stable_ranks", "step": 4, "layers": {"a<b>": stable}, "seconds": 0.1, "tolerance": 0.02},
    ]
    monitor, scalars = ConsoleMonitor(4), Curves()
    for record in records[1:]:
        monitor.write(record)
    assert capsys.readouterr().out.splitlines() == [
        "step 2  weights, mean over 1 dense layer: effective rank 1.3 (null 2.5), stable rank 1.1 (null 2.0)",
        "step 4  stable ranks: 1 of 1 dense layer settled, scaled mean 3.3, largest change 0.0125 (tolerance 0.0200)",
    ]
    found = [scalars.entries(record).scalars for record in records[1:]]
    assert found[0]["weights/weight_effective_rank/a<b>"] == 1.333
    assert found[1] == {"weights/stable_rank/a<b>": 1.1, "weights/scaled_stable_rank/a<b>": 3.3}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "config.yaml").write_text("run: {name: x}\n")
    main(["report", "--run", str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert "Weights of dense layers" in page and "a&lt;b&gt;" in page and "a<b>" not in page
    assert "1.3 (2.5)" in page and "Scaled stable rank" in page


def test_the_library_factors_once_the_stable_ranks_have_settled() -> None:
    method = inrank.PretrainThenFactorise(
        ["0", "2"], steps=30, total_steps=40, dense_until="stable_rank", mode="fixed", interval=2,
        stable_rank_tolerance=0.05, stable_rank_window=2, max_rank_fraction=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    inputs, targets = torch.randn(64, 12), torch.randn(64, 3)
    run = inrank.LowRankRun(
        lambda: nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)),
        method,
        lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    )
    factored_at = None
    while run.step < 40:
        nn.functional.mse_loss(run.model(inputs), targets).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        kinds = [record["kind"] for record in run.after_step()]
        if "rank_event" in kinds:
            factored_at = run.step
            assert kinds == ["stable_ranks", "rank_check", "rank_event"]
        elif run.step % 2 == 0 and factored_at is None:
            assert kinds == ["stable_ranks"]
    assert factored_at and factored_at < 30 and set(run.ranks) == {"0", "2"}
