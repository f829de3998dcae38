"""Configuration of a run, read from a YAML file and command-line overrides.

The dataclass of each section is defined in the package that uses it. Errors are reported in one line that says what to
write instead.
"""

import contextlib
import dataclasses
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .data.settings import DataSettings, TokenizerSettings
from .engine.settings import ParallelSettings
from .method.settings import LowRankSettings
from .models import ModelSettings
from .optim.settings import Matrices, OptimizerSettings, optimizers_of
from .runtime import yaml_text
from .runtime.errors import UserError, nearest
from .runtime.home import expand_home
from .runtime.resume import OnResume
from .runtime.setting_types import as_list, fits, in_words, parse
from .runtime.yaml_text import shown
from .train.settings import CheckpointSettings, EvalSettings, LogSettings, ScheduleSettings, TrainSettings


@dataclass(kw_only=True)
class RunSettings:
    """Name, folder and seed of a run."""

    ON_RESUME: ClassVar[OnResume] = OnResume(free=("name", "dir", "deterministic"), fixed=("seed",))

    name: str = "run"
    """Name of the run."""
    dir: str | None = None
    """Run folder. null: runs/NAME."""
    seed: int = 0
    """Seed of the initial values, the order of the samples, dropout and new modes."""
    deterministic: bool = False
    """Use deterministic kernels only. Slower on a GPU; an operation without a deterministic kernel raises an error."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"run.seed is {self.seed}; write a whole number of at least 0")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return expand_home(self.dir, "run.dir") if self.dir else Path("runs") / self.name


@dataclass(kw_only=True)
class Config:
    """All settings of a run.

    Raises:
        UserError: if settings of different sections contradict each other.
    """

    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings
    lowrank: LowRankSettings = field(default_factory=LowRankSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    data: DataSettings = field(default_factory=DataSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    log: LogSettings = field(default_factory=LogSettings)

    def __post_init__(self) -> None:
        steps, low = self.train.steps, self.lowrank
        if self.schedule.warmup_steps >= steps:
            raise UserError(
                f"schedule.warmup_steps is {self.schedule.warmup_steps} of train.steps {steps}; "
                f"write fewer than {steps}"
            )
        if low.freezes and low.freeze_at(steps) > steps:
            raise UserError(
                f"lowrank freezes at step {low.freeze_at(steps)} but train.steps is {steps}; "
                f"write a lowrank.freeze_step of at most {steps}, or lowrank.mode: inrank"
            )
        dense = low.dense_steps(steps)
        if dense >= steps:
            raise UserError(
                f"lowrank.dense_fraction is {low.dense_fraction} but train.steps is {steps}, so no layer would be "
                "factored; write a lower fraction, more steps, or lowrank.mode: full"
            )
        if dense and low.freezes and isinstance(low.freeze_step, int) and low.freeze_step < dense:
            raise UserError(
                f"lowrank.freeze_step is {low.freeze_step} but with lowrank.dense_fraction {low.dense_fraction} the "
                f"layers are dense until step {dense}; write a freeze_step of at least {dense}"
            )
        if low.mode != "full" and not low.freezes and low.base == "decay" and low.warmup_steps > steps:
            raise UserError(
                f"lowrank.warmup_steps is {low.warmup_steps} but train.steps is {steps}, so the base would stay; "
                f"write at most {steps}, or lowrank.base: frozen"
            )
        if low.frobenius_in_loss and low.frobenius_decay and self.parallel.engine.startswith("zero"):
            raise UserError(
                f"lowrank.frobenius_in_loss is true and parallel.engine is {self.parallel.engine}, which partitions "
                "gradients into flat pieces; write parallel.engine: fsdp, or lowrank.frobenius_in_loss: false"
            )
        self._check_loaded()
        self._check_optimizer()

    def _check_loaded(self) -> None:
        low, folder = self.lowrank, self.model.init_from
        if folder is not None and self.tokenizer.path is None:
            raise UserError(
                f"model.init_from is {folder} but tokenizer.path is null, so a tokenizer with other tokens would be "
                "trained; write the tokenizer.path of that model"
            )
        if folder is not None and low.track_updates:
            raise UserError(
                f"lowrank.track_updates is {low.track_updates} but model.init_from is {folder}; W(0) is drawn from the "
                "seed; write lowrank.track_updates: 0"
            )
        if low.mode == "full" or low.dense_fraction:
            return
        if folder is None and low.init == "loaded":
            raise UserError(
                "lowrank.init is loaded but model.init_from is null; write a folder, or lowrank.init: orthogonal"
            )
        if folder is not None and low.init != "loaded":
            raise UserError(
                f"model.init_from is {folder} but lowrank.init {low.init} replaces the weights of the low-rank layers; "
                "write lowrank.init: loaded"
            )

    def _check_optimizer(self) -> None:
        name, engine = self.optimizer.name, self.parallel.engine
        if not self.optimizer.orthogonalises:
            return
        if self.lowrank.mode != "full" and self.lowrank.depth > 2:
            raise UserError(
                f"optimizer.name is {name} but lowrank.depth is {self.lowrank.depth}, and its updates are for pairs of "
                "factors; write optimizer.name: adamw, or lowrank.depth: 2"
            )
        if engine.startswith("zero"):
            raise UserError(
                f"optimizer.name is {name} and parallel.engine is {engine}, which cuts matrices into flat pieces; "
                "write parallel.engine: fsdp, or optimizer.name: adamw"
            )
        wanted: Matrices = "dense" if self.lowrank.mode == "full" else "factors"
        if self.optimizer.entry.matrices != wanted:
            advice = " or ".join(optimizers_of(wanted))
            fact = "has no factors" if self.lowrank.mode == "full" else "trains factors"
            raise UserError(
                f"optimizer.name is {name} but lowrank.mode {self.lowrank.mode} {fact}; write optimizer.name: {advice}"
            )

    def base_scale(self, step: int) -> float:
        """Return the scale ``a`` of the bases after ``step`` optimizer steps."""
        return self.lowrank.policy(self.train.steps).base_scale(step)

    def to_yaml(self) -> str:
        """Return the resolved settings as YAML, which ``load_config`` can read."""
        return yaml_text.dump(self.to_dict())

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return a nested dictionary, section -> key -> value, with the names used in YAML files."""
        return {
            section: {
                key_of(setting): getattr(getattr(self, section), setting.name) for setting in dataclasses.fields(cls)
            }
            for section, cls in SECTIONS.items()
        }

    def changed(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults, by dotted key."""
        return {
            f"{section}.{key_of(setting)}": value
            for section, cls in SECTIONS.items()
            for setting in dataclasses.fields(cls)
            if (value := getattr(getattr(self, section), setting.name)) != default_of(setting)
        }

    def cautions(self) -> list[str]:
        """Return warnings about combinations of settings that give misleading results."""
        if not (self.lowrank.grows and self.optimizer.orthogonalises):
            return []
        advice = "choose the rank: lowrank.mode fixed, or lowrank.final budget"
        if self.lowrank.has_budget:
            advice = f"lowrank.final {self.lowrank.final} chooses those at the freeze, and earlier ones are no finding"
        same = (
            f"with optimizer.name {self.optimizer.name} the rule finds nearly the same ranks where there is nothing to"
        )
        return [f"{same} learn, because all modes move at one pace; {advice}"]

    def without_effect(self, given: Iterable[str]) -> list[str]:
        """Return warnings about the dotted keys in ``given`` that have no effect in this configuration.

        Keys with their default values are ignored, because the ``config.yaml`` of a run contains every key.
        """
        idle = self.idle()
        return [f"{key} has no effect: {idle[key]}" for key in sorted(idle.keys() & set(given) & self.changed().keys())]

    def idle(self) -> dict[str, str]:
        """Return the dotted keys that have no effect in this configuration, with the reasons."""
        idle = {f"lowrank.{key}": why for key, why in self.lowrank.without_effect()}

        def no_effect(why: str, section: str, *keys: str) -> None:
            idle.update({f"{section}.{key}": why for key in keys})

        if self.parallel.engine not in ("auto", "fsdp"):
            no_effect(f"parallel.engine is {self.parallel.engine}", "parallel", "shard_size", "reduce_each_micro_batch")
        if not self.parallel.engine.startswith("zero"):
            no_effect(f"parallel.engine is {self.parallel.engine}", "parallel", "deepspeed")
        if self.lowrank.grows and not self.lowrank.freezes:
            no_effect(f"lowrank.mode is {self.lowrank.mode}, whose shapes are never final", "train", "cuda_graph")
        if all(step > self.train.steps for step in self.train.profile):
            no_effect(f"train.steps is {self.train.steps}", "train", "profile")
        if not self.optimizer.orthogonalises:
            no_effect(f"optimizer.name is {self.optimizer.name}", "optimizer", "matrix_lr", "momentum")
        if self.schedule.name != "wsd":
            no_effect(f"schedule.name is {self.schedule.name}", "schedule", "decay_fraction")
        if self.schedule.name == "constant":
            no_effect("schedule.name is constant", "schedule", "min_lr_ratio")
        if self.eval.interval == 0:
            no_effect("eval.interval is 0", "eval", "batches")
        if not self.log.trackers:
            no_effect("log.trackers is []", "log", "project")
        if self.tokenizer.path:
            no_effect("tokenizer.path is set", "tokenizer", "kind", "max_training_bytes")
        else:
            no_effect("tokenizer.path is null", "tokenizer", "eos_token", "special_tokens_in_text", "pattern")
        idle.update({f"data.{key}": why for key, why in self.data.without_effect()})
        return idle


def key_of(setting: "dataclasses.Field[Any]") -> str:
    """Return the YAML key of a setting, which is the field name without a trailing underscore (``async_``)."""
    return setting.name.rstrip("_")


def _types(section: type) -> dict[str, Any]:
    hints = typing.get_type_hints(section, include_extras=True)
    return {key_of(setting): hints[setting.name] for setting in dataclasses.fields(section)}


SECTIONS: dict[str, Any] = _types(Config)
"""Dataclass of each section, by section name."""
SETTINGS: dict[str, Any] = {
    f"{section}.{key}": type_ for section, cls in SECTIONS.items() for key, type_ in _types(cls).items()
}
"""Type of each setting, by dotted key."""

MOST = 2**53
"""Largest allowed integer. Integers up to this value are exact in float64."""


def load_config(file: str | Path | None, overrides: Sequence[str] = ()) -> tuple[Config, set[str]]:
    """Read a YAML file and apply ``--section.key VALUE`` overrides.

    A file with ``base: FILE`` inherits the settings of that file. The path is relative to the folder of the inheriting
    file. Inherited settings that have no effect in the resulting configuration are reset to their defaults.

    Args:
        file: path of the YAML file, or None to use only defaults and overrides.
        overrides: command-line arguments, ``--section.key VALUE`` or ``--section.key=VALUE``.

    Returns:
        The configuration, and the dotted keys set by an override, or by the file itself unless it is an override that
        makes them have no effect.

    Raises:
        UserError: if the file cannot be read, or a setting is unknown, missing or invalid.
    """
    inherited, own = _read_yaml(Path(file)) if file is not None else ({}, {})
    overriding = {key: parse(text, SETTINGS[key]) for key, text in _split(overrides)}
    values = own | overriding
    config = _build(inherited | values)
    if idle := config.idle().keys() & inherited.keys() - values.keys():
        config = _build({key: value for key, value in (inherited | values).items() if key not in idle})
    silenced = config.idle().keys() & own.keys() - overriding.keys()
    with contextlib.suppress(UserError):  # of a file that is incomplete without the overrides
        silenced -= _build(inherited | own).idle().keys()
    return config, values.keys() - silenced


def _build(values: dict[str, Any]) -> Config:
    sections: dict[str, Any] = {}
    for dotted, value in values.items():
        expected = SETTINGS[dotted]
        if not fits(value, expected):
            quotes = ", in quotes" if expected is str else ""  # YAML reads 007 as a number and no as false
            raise UserError(
                f"{dotted} is {shown(value)}; write {as_list(value, expected) or in_words(expected)}{quotes}"
            )
        # An integer is a valid value of a float setting.
        is_float = type(value) is int and float in (expected, *typing.get_args(expected))
        if type(value) is int and abs(value) > MOST:
            raise UserError(f"{dotted} is {shown(value)}; write a number of at most {MOST}")
        section, _, key = dotted.partition(".")
        sections.setdefault(section, {})[key] = float(value) if is_float else value
    for section, cls in SECTIONS.items():
        present = sections.setdefault(section, {})
        missing = [
            key_of(setting)
            for setting in dataclasses.fields(cls)
            if present.get(key_of(setting)) is None and is_required(setting, present)
        ]
        if missing:
            names = ", ".join(f"{section}.{name}" for name in missing)
            words = in_words(SETTINGS[f"{section}.{missing[0]}"], required=True)
            are, each = ("is", "") if len(missing) == 1 else ("are", " for each")
            raise UserError(f"{names} {are} missing; write {words}{each}")
    try:
        return Config(**{section: _fill(cls, sections[section]) for section, cls in SECTIONS.items()})
    except ValueError as error:
        raise UserError(str(error)) from None


def _fill(cls: Any, values: dict[str, Any]) -> Any:
    return cls(**{s.name: values[key_of(s)] for s in dataclasses.fields(cls) if key_of(s) in values})


def default_of(key: "dataclasses.Field[Any]") -> Any:
    """Return the default of a setting, or ``dataclasses.MISSING`` if it has none."""
    return key.default if key.default_factory is dataclasses.MISSING else key.default_factory()


def is_required(key: "dataclasses.Field[Any]", given: Mapping[str, Any]) -> bool:
    """Return whether a setting is required, given the other settings of its section."""
    if default_of(key) is dataclasses.MISSING:
        return True
    other, value = key.metadata.get("required_unless", (None, None))
    return other is not None and given.get(other) != value


def _read_yaml(file: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return two dictionaries by dotted key: the settings inherited from the base, and those of the file itself.

    Args:
        file: path of the YAML file.
        above: files that inherit from this one, to detect cycles.
    """
    tree = yaml_text.read(file)
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{file} holds no settings; write sections such as 'model:' with keys below them")
    if "base" not in tree:
        return {}, dict(_read_sections(file, tree))
    base = tree.pop("base")
    if not isinstance(base, str):
        raise UserError(
            f"{file}: base is {shown(base)}; write the file whose settings it takes, such as quickstart.yaml"
        )
    above = (*above, file.resolve())
    if (file.parent / base).resolve() in above:
        raise UserError(f"{file}: base {base} is based on this file itself; write another base, or remove it")
    inherited, own = _read_yaml(file.parent / base, above)
    return inherited | own, dict(_read_sections(file, tree))


def _read_sections(file: Path, tree: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and their values; raise UserError for unknown names."""
    for section, content in tree.items():
        if section not in SECTIONS:
            raise UserError(f"{file}: unknown section {shown(section)}{nearest(str(section), SECTIONS)}")
        if content is None or content == {}:
            raise UserError(f"{file}: section {section} is empty; write keys below it, or remove it")
        if not isinstance(content, dict):
            raise UserError(f"{file}: section {section} holds {shown(content)}; write keys below it, one a line")
        for key, value in content.items():
            yield _known(f"{section}.{key if isinstance(key, str) else shown(key)}", f"{file}: "), value


def _split(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield dotted keys and the text of their values from command-line arguments."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"{word!r} is no option; write overrides as --section.key VALUE")
        key, equals, text = word[2:].partition("=")
        _known(key)
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{key} lacks its value; write --{key} VALUE")
            text = rest.pop(0)
        yield key, text


def _known(dotted: str, place: str = "") -> str:
    """Return the key if it is a known setting, otherwise raise UserError with ``place`` before the message."""
    if dotted in SETTINGS:
        return dotted
    section, key = dotted.partition(".")[0], dotted.rpartition(".")[2]
    same_key = [name for name in SETTINGS if name.endswith(f".{key}")]
    same_section = [name for name in SETTINGS if name.startswith(f"{section}.")]
    longer = [name for name in same_section if name.endswith(f"_{key}")]
    if longer and not same_key:
        raise UserError(f"{place}unknown setting {dotted!r}; did you mean {' or '.join(map(repr, longer))}?")
    raise UserError(f"{place}unknown setting {dotted!r}{nearest(dotted, same_key or same_section or SETTINGS)}")
