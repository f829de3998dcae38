"""Changes of settings when a run resumes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import SECTIONS, SETTINGS, Config, load_config
from ..method.initial import fits, layer_shapes
from ..runtime.errors import UserError
from ..runtime.resume import OnResume
from ..runtime.yaml_text import shown
from .building import dense_skeleton
from .checkpoint import Checkpoint, mismatch, named_folders, step_of
from .schedule import decay_begins, planned_rate


@dataclass(frozen=True)
class Change:
    """A setting that differs from the one in the checkpoint. Values are in YAML notation."""

    key: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.key} was {self.was} and is {self.now}"


def refuse_changes(config: Config, checkpoint: Checkpoint, allowed: Sequence[str]) -> list[Change]:
    """Check that the configuration is compatible with the settings and the tensors of a checkpoint.

    Args:
        config: the current configuration.
        checkpoint: the checkpoint to resume from.
        allowed: dotted keys that the user allows to change (``--allow-change``).

    Returns:
        All settings that have changed.

    Raises:
        UserError: if a setting has changed that cannot change within a run, or that affects training and is not in
            ``allowed``, or if the tensors do not fit the model.
    """
    run_folder, changes = checkpoint.run_folder, []
    before, now = load_config(checkpoint.config_file)[0].to_dict(), config.to_dict()
    for key in SETTINGS:
        section, _, name = key.partition(".")
        change = Change(key, shown(before[section][name]), shown(now[section][name]))
        if change.was == change.now:
            continue
        changes.append(change)
        facts: OnResume = SECTIONS[section].ON_RESUME
        differs = f"{run_folder} was trained with {key} {change.was}, now it is {change.now}"
        becomes_dense = key == "lowrank.mode" and "full" in (change.was, change.now)
        if facts.is_fixed(name) or becomes_dense:
            raise UserError(
                f"{differs}, which cannot change within a run; write {change.was}, or another run.dir to start anew"
            )
        if not facts.is_free(name) and key not in allowed:
            raise UserError(
                f"{differs}; write {change.was}, or another run.dir to start anew, or --allow-change {key} to go on "
                "with it"
            )
    _refuse_misfit(config, checkpoint)
    return changes


def _refuse_misfit(config: Config, checkpoint: Checkpoint) -> None:
    """Raise UserError unless the shapes in the checkpoint are those of the configured model. Loads no tensors."""
    state = checkpoint.state
    skeleton = dense_skeleton(config.model, state.vocab_size, lowrank=config.lowrank)
    shapes = layer_shapes(skeleton, config.lowrank)
    advice = "write the settings that it was trained with, or another run.dir to start anew"
    if not fits(state.layout, shapes, config.lowrank):
        raise UserError(
            f"{checkpoint.run_folder} has {len(state.layout)} low-rank layers; lowrank.mode {config.lowrank.mode}, "
            f"targets {config.lowrank.targets} makes {len(shapes)}; {advice}"
        )
    if found := mismatch(checkpoint, config, skeleton, "the settings make"):
        raise UserError(f"{checkpoint.folder} holds {found}; {advice}")


def learning_rate_jump(config: Config, checkpoint: Checkpoint, changes: Sequence[Change]) -> str | None:
    """Return a warning if changed settings make the learning rate jump, with advice if there is any, else None."""
    before, step = load_config(checkpoint.config_file)[0], checkpoint.state.step
    steps_before, steps = before.train.steps, config.train.steps
    if step == 0 or step >= steps:
        return None
    jumps, factored = [], bool(checkpoint.state.layout)
    for name in ("lr", "matrix_lr") if config.optimizer.orthogonalises else ("lr",):
        last, planned = (planned_rate(before, name, each, factored=factored) for each in (step - 1, step))
        now = planned_rate(config, name, step, factored=factored)
        if not math.isclose(now, planned, rel_tol=0.01):
            what = "the learning rate" if name == "lr" else "that of the matrices"
            jumps.append(f"{what} goes from {last:.3g} at step {step} to {now:.3g} at step {step + 1}")
    if not jumps:
        return None
    rates = (
        "train.steps",
        "optimizer.lr",
        "optimizer.matrix_lr",
        "lowrank.factorized_lr_scale",
        "lowrank.dense_fraction",
    )
    reasons = [change for change in changes if change.key in rates or change.key.startswith("schedule.")]
    line = f"{' and '.join(jumps)}, since {', '.join(map(str, reasons))}"
    if steps == steps_before:
        return line
    if before.schedule.name != "wsd":
        return (
            f"{line}; with schedule.name wsd it stays at its peak until the decay, and --from RUN --from-step N "
            "--run.dir NEW goes on from a step before that"
        )
    begin = decay_begins(before.schedule, steps_before)
    stable = [step_of(folder) for folder in named_folders(checkpoint.run_folder) if step_of(folder) <= begin]
    if not stable:
        return f"{line}; its decay began at step {begin}, and no checkpoint from before it is kept"
    return (
        f"{line}; its decay began at step {begin}: --from {checkpoint.run_folder} --from-step {stable[-1]} "
        "--run.dir NEW goes on from before it"
    )
