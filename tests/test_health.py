"""Steps that would do harm are not taken, by any process; failures to write are told and lose nothing."""

import errno
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from runs import small_config, train
from sharing import nightly, slow

from inrank_dist.runtime.context import Context
from inrank_dist.runtime.errors import UserError
from inrank_dist.train.checkpoint import find_checkpoint, folder, list_checkpoints, step_of
from inrank_dist.train.health import WINDOW, Health
from inrank_dist.train.loop import Trainer
from inrank_dist.train.monitors import Monitors
from inrank_dist.train.settings import TrainSettings


@pytest.mark.parametrize(
    ("engine", "where"),
    [
        ("fsdp", "gradient"),
        ("ddp", "loss"),
        ("fsdp", "backward"),
        ("ddp", "backward"),
        nightly("fsdp", "loss"),
        nightly("ddp", "gradient"),
        nightly("zero0", "loss"),
        slow("zero1", "gradient"),
        nightly("zero2", "gradient"),
        slow("zero2", "backward"),
        nightly("zero3", "gradient"),
        slow("zero3", "loss"),
    ],
)
def test_a_bad_gradient_in_one_process_is_skipped_by_all(pool: Pool, corpus: Path, engine: str, where: str) -> None:
    """Weights and moments stay to the bit; one line says which process and which step; training goes on."""
    config = small_config(corpus, parallel__engine=engine, train__steps=12, lowrank__warmup_steps=12)
    for records, changed in pool.run("checks:bad_gradient", config, where, 1, 9, world_size=2):
        assert changed == []
        (skipped,) = [record for record in records if record["kind"] == "skipped"]
        reason = f"the {'loss' if where == 'loss' else 'gradient'} is not finite"
        del skipped["time"]
        assert skipped == {"kind": "skipped", "step": 10, "reason": reason, "processes": [1], "skipped": 1}
        losses = {record["step"]: record["loss"] for record in records if record["kind"] == "step"}
        assert torch.isfinite(torch.tensor([losses[step] for step in (9, 11, 12)])).all()


def test_the_control_changes_everything(pool: Pool, corpus: Path) -> None:
    """What the test above compares does move in a step that is taken."""
    config = small_config(corpus, train__steps=12, lowrank__warmup_steps=12)
    for records, changed in pool.run("checks:bad_gradient", config, "nowhere", 1, 9, world_size=2):
        assert not [record for record in records if record["kind"] == "skipped"]
        assert any(name.endswith(".U") for name in changed)
        assert any(name.startswith("optimizer.exp_avg_sq.") for name in changed)


def test_a_bad_batch_gives_no_growth_directions(pool: Pool, corpus: Path) -> None:
    """Growth right after a skipped step must not look along a gradient that is not finite."""
    config = small_config(corpus, lowrank__growth_init="gradient", train__steps=12, lowrank__warmup_steps=12)
    for records, changed in pool.run("checks:bad_gradient", config, "loss", 0, 7, world_size=2):
        assert changed == []
        assert [record["step"] for record in records if record["kind"] == "rank_event"] == [8, 12]
        assert all(record["loss"] < 10 for record in records if record["kind"] == "step" and record["step"] != 8)


def test_a_checkpoint_right_after_a_skipped_step_is_resumed(corpus: Path, tmp_path: Path) -> None:
    """The count goes on where it stood, and the optimizer's step is behind the run's."""
    config = small_config(corpus, run__dir=tmp_path, checkpoint__interval=4, train__max_skipped=2)

    def hook(trainer: Trainer) -> None:
        loss = trainer.engine.loss
        trainer.engine.loss = lambda *batch: loss(*batch) * (float("nan") if trainer.step == 7 else 1)  # type: ignore

        def ends(batches: Any) -> Any:
            raise KeyboardInterrupt

        train_step = trainer._update
        trainer._update = lambda batches: (ends if trainer.step == 9 else train_step)(batches)  # type: ignore

    with pytest.raises(KeyboardInterrupt):
        train(config, hook=hook)
    state = find_checkpoint(tmp_path).state
    assert (state.step, state.optimizer_steps, state.health["skipped"]) == (8, 7, 1)

    def goes_on(trainer: Trainer) -> None:
        assert (trainer.step, trainer.engine.optimizer_steps, trainer.health.skipped) == (8, 7, 1)
        steps = {float(each["step"]) for each in trainer.engine.optimizer.state.values()}
        assert steps == {7.0}

    train(config, resume=True, hook=goes_on)
    assert find_checkpoint(tmp_path).state.optimizer_steps == 29


def test_too_many_skipped_steps_stop_the_run(corpus: Path, tmp_path: Path) -> None:
    """What diverged does not come back; the checkpoint from before is the last one."""
    config = small_config(corpus, run__dir=tmp_path, train__max_skipped=3, checkpoint__interval=4)

    def hook(trainer: Trainer) -> None:
        loss = trainer.engine.loss
        trainer.engine.loss = lambda *batch: loss(*batch) * (float("inf") if trainer.step >= 9 else 1)  # type: ignore

    message = (
        r"at step 12 the loss is not finite \(process 0\), and 3 steps in a row were skipped \(train.max_skipped\)"
    )
    with pytest.raises(UserError, match=message):
        train(config, hook=hook)
    assert step_of(list_checkpoints(tmp_path)[-1]) == 8


def health(**settings: Any) -> Health:
    return Health(Context(), TrainSettings(**settings), 1e-3)


def judged(health: Health, loss: float) -> Any:
    one = torch.tensor(1.0)
    verdict = health.judge(torch.tensor(loss), one, one, torch.tensor(False), 1, stop=False, failed=False)
    health.count(verdict, 1)
    return verdict


@pytest.mark.parametrize("skip", [False, True])
def test_spikes_are_reported_and_may_be_skipped(skip: bool) -> None:
    """Six standard deviations above the last losses; a spike that was skipped does not widen the measure."""
    watched = health(skip_spikes=skip)
    for index in range(WINDOW):
        assert judged(watched, 3.0 + 0.1 * (index % 2)).spike is None
    assert judged(watched, 3.05 + 0.05 * 5.9).spike is None
    state = watched.state_dict()
    verdict = judged(watched, 9.0)
    assert verdict.spike > 6
    assert (verdict.reason is not None) == skip
    assert (watched.state_dict()["losses"] == state["losses"]) == skip
    assert judged(health(), 100.0).spike is None  # nothing to compare with yet
    resumed = health(skip_spikes=skip)
    resumed.load_state_dict(state)
    assert judged(resumed, 9.0) == verdict


def test_no_deviations_is_no_watch() -> None:
    watched = health(spike_deviations=0.0)
    assert all(judged(watched, loss).spike is None for loss in [3.0] * WINDOW + [1e6])


@pytest.mark.parametrize("asynchronous", [False, slow(True)])
@pytest.mark.parametrize("engine", ["local", slow("fsdp")])
def test_a_disk_that_takes_no_more_stops_the_run_and_loses_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, asynchronous: bool
) -> None:
    """The system itself refuses to write beyond a limit in the middle of a tensor file."""
    config = small_config(corpus, run__dir=tmp_path, parallel__engine=engine, checkpoint__interval=4)
    config.checkpoint.async_ = asynchronous
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def hook(trainer: Trainer) -> None:
        save = trainer.save

        def full(**options: Any) -> None:
            if trainer.step == 12:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            save(**options)

        trainer.save = full  # type: ignore[method-assign]

    try:
        with pytest.raises(UserError, match=r"step-00000012 could not be written \(File too large\); .*last complete"):
            train(config, hook=hook)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert find_checkpoint(tmp_path).state.step == 8
    recorder, _ = train(config, resume=True)  # with room again, it goes on
    assert recorder.records[0]["kind"] == "resume"
    assert find_checkpoint(tmp_path).state.step == 30


@pytest.mark.parametrize("work", ["seal", "commit", "retain", "begin"])
def test_no_space_left_says_so(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    """At every stage of a save: one line, and the checkpoints that were complete still are."""
    original = getattr(folder, work)

    def fails(*arguments: Any, **options: Any) -> Any:
        if any(step_of(each) == 8 for each in list_checkpoints(tmp_path)):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments, **options)

    monkeypatch.setattr(folder, work, fails)
    with pytest.raises(
        UserError, match=r"could not be written \(No space left on device\); free space and run the same"
    ):
        train(small_config(corpus, run__dir=tmp_path, checkpoint__interval=4))
    assert find_checkpoint(tmp_path).state.step == 8


def test_a_failed_save_behind_the_training_is_told_at_the_next_step(corpus: Path, tmp_path: Path) -> None:
    """Not only at the next save."""
    config = small_config(corpus, run__dir=tmp_path, checkpoint__interval=4, train__steps=30)
    config.checkpoint.async_ = True
    steps: list[int] = []

    def hook(trainer: Trainer) -> None:
        train_step, commit = trainer._update, trainer.writer._commit

        def waits(batches: Any) -> Any:
            steps.append(trainer.step)
            if trainer.step == 5:
                while not trainer.writer.failure:
                    pass
            return train_step(batches)

        def fails(*arguments: Any) -> None:
            raise OSError(errno.EIO, "Input/output error")

        trainer._update, trainer.writer._commit = waits, fails if commit else commit  # type: ignore

    with pytest.raises(UserError, match=r"step-00000004 could not be written \(Input/output error\)"):
        train(config, hook=hook)
    assert steps in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5])


def test_a_lost_model_is_not_saved(corpus: Path, tmp_path: Path) -> None:
    """An update that overflows looks healthy in its own step; its checkpoints would push out the sound ones."""
    config = small_config(corpus, run__dir=tmp_path, checkpoint__interval=2)

    def hook(trainer: Trainer) -> None:
        step = trainer.engine.step

        def overflows(lr: float, norm: torch.Tensor) -> None:
            step(lr, norm)
            if trainer.step == 9:
                next(iter(trainer.engine.parameters().values())).data[0] = float("inf")

        trainer.engine.step = overflows  # type: ignore[method-assign]

    with pytest.raises(UserError, match="at step 10 weights or moments are not finite, so no checkpoint was written"):
        train(config, hook=hook)
    assert [step_of(each) for each in list_checkpoints(tmp_path)] == [6, 8]


def test_records_that_cannot_be_written_are_told() -> None:
    """The disk is full: metrics are written at every step and meet it first."""

    class Full:
        def write(self, record: dict[str, Any]) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    with pytest.raises(UserError, match=r"records cannot be written \(No space left on device\)"):
        Monitors([Full()]).write({"kind": "step"})


def test_other_targets_are_refused_before_anything_is_built(corpus: Path, tmp_path: Path) -> None:
    """What ``--allow-change`` cannot make true."""
    train(small_config(corpus, run__dir=tmp_path))
    changed = small_config(corpus, run__dir=tmp_path, lowrank__targets="[mlp]", train__steps=31)
    with pytest.raises(UserError, match=r"has 12 low-rank layers; .*targets \['mlp'\] makes 4"):
        train(changed, resume=True)
