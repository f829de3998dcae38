"""Reads and validates a study file."""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ..config import SETTINGS, Config, load_config
from ..runtime import yaml_text
from ..runtime.errors import UserError, nearest
from ..runtime.yaml_text import shown

Unit = Literal["tokens", "flops", "seconds"]
UNITS: tuple[Unit, ...] = ("tokens", "flops", "seconds")

KEYS = ("base", "dir", "processes", "seeds", "tuning_seeds", "budget", "settings", "variants")
VARIANT_KEYS = ("control", "settings", "tune", "budget", "seconds_per_step")
RESERVED = ("run.dir", "run.name", "run.seed", "train.steps")
"""Settings that the study sets for each run."""

Settings = Mapping[str, str]
"""Dotted key -> value in YAML notation."""

Point = tuple[tuple[str, str], ...]
"""A point of a grid: pairs of dotted key and value."""


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to train.

    Attributes:
        control: name of the variant to compare it with; None if it is only a control itself.
        settings: changes to the base config.
        grid: dotted key -> values to try. All combinations are tried and the best one is used.
        units: of the study's budget, for which the variant is compared.
        seconds_per_step: as measured elsewhere; None: that of the runs.
    """

    name: str
    control: str | None
    settings: Settings
    grid: Mapping[str, tuple[str, ...]]
    units: tuple[Unit, ...]
    seconds_per_step: float | None = None

    @property
    def points(self) -> list[Point]:
        """All combinations of the grid; a single empty one if nothing is tuned."""
        return [tuple(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    def at_an_edge(self, point: Point) -> list[str]:
        """Keys whose value is the smallest or largest number tried, so that better ones may lie beyond."""
        found = []
        for key, value in point:
            numbers = [number for each in self.grid[key] if (number := _number(each)) is not None]
            if 1 < len(numbers) == len(self.grid[key]) and float(value) in (min(numbers), max(numbers)):
                found.append(key)
        return found


@dataclass(frozen=True, eq=False)
class Study:
    """The content of a study file.

    Attributes:
        file: path of the study file.
        base: config that every run starts from.
        folder: for runs, logs and results.
        processes: per run; several are started with torchrun.
        seeds, tuning_seeds: for the comparison and for the grids. They are disjoint, so that tuning does not use the
            runs it is judged by.
        budget: unit -> how much of it a run may use; None means as much as its ``root``. Always contains tokens.
        settings: changes to the base config for all runs.
        text: content of the study file.
    """

    file: Path
    base: Path
    folder: Path
    processes: int
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    budget: Mapping[Unit, float | None]
    variants: Mapping[str, Variant]
    settings: Settings = field(default_factory=dict)
    text: str = ""

    def root(self, variant: Variant) -> Variant:
        """The variant without a control that is reached from one control to the next."""
        while variant.control is not None:
            variant = self.variants[variant.control]
        return variant

    def config(self, variant: Variant, point: Point, seed: int, steps: int, run: Path | None = None) -> Config:
        """The settings of one run.

        Raises:
            UserError: the settings are not valid.
        """
        overrides = {
            **self.settings,
            **variant.settings,
            **dict(point),
            "run.seed": str(seed),
            "train.steps": str(steps),
        }
        if run is not None:
            overrides["run.dir"] = str(run)
        try:
            return load_config(self.base, [f"--{key}={value}" for key, value in overrides.items()])[0]
        except UserError as error:
            raise UserError(f"variant {variant.name!r} of {self.file}: {error}") from None

    def steps_for_tokens(self, variant: Variant, point: Point) -> int:
        """Number of optimizer steps that use the token budget."""
        return _steps_for_tokens(self, variant, point)


@cache  # called at every poll, and reads the config from a file
def _steps_for_tokens(study: Study, variant: Variant, point: Point) -> int:
    config = study.config(variant, point, 0, load_config(study.base)[0].train.steps)
    tokens = study.budget["tokens"]
    assert tokens is not None
    return max(1, round(tokens / (config.train.global_batch_size * config.model.max_seq_len)))


def read_study(file: Path) -> Study:
    """Read a study file and validate it, including the settings of every run.

    Raises:
        UserError: with what to write instead.
    """
    tree = yaml_text.read(file)
    if not isinstance(tree, dict):
        raise UserError(f"{file} holds no study; write base: CONFIG and variants: below which each has a name")
    _known(tree, KEYS, f"{file}: ")
    for key in ("base", "variants"):
        if key not in tree:
            raise UserError(f"{file} lacks {key}; write " + ("base: CONFIG.yaml" if key == "base" else "variants:"))
    base = (file.parent / str(tree["base"])).resolve()
    config = load_config(base, [])[0]
    tokens = config.train.steps * config.train.global_batch_size * config.model.max_seq_len
    budget = {"tokens": float(tokens), **_budget(file, tree.get("budget", {}))}
    variants = _variants(file, tree["variants"], tuple(budget))
    study = Study(
        file=file,
        base=base,
        folder=Path(str(tree.get("dir") or f"runs/{file.stem}")),
        processes=_whole(tree.get("processes", 1), f"{file}: processes"),
        seeds=_seeds(tree.get("seeds", [0, 1, 2]), f"{file}: seeds"),
        tuning_seeds=_seeds(tree.get("tuning_seeds", [100]), f"{file}: tuning_seeds"),
        budget=budget,
        variants=variants,
        settings=_settings(tree.get("settings", {}), f"{file}: settings"),
        text=file.read_text(encoding="utf-8"),
    )
    if both := sorted({*study.seeds} & {*study.tuning_seeds}):
        raise UserError(
            f"{file}: seed {both[0]} is in seeds and in tuning_seeds, so what is tuned would be chosen on what it is "
            "judged by; write other tuning_seeds"
        )
    for variant in variants.values():
        for point in variant.points:
            config = study.config(variant, point, 0, study.steps_for_tokens(variant, point))
            if config.eval.interval == 0:
                raise UserError(
                    f"variant {variant.name!r} of {file}: eval.interval is 0, and validation losses are what is "
                    "compared; write the number of steps between validations"
                )
    return study


def _variants(file: Path, tree: Any, units: tuple[Unit, ...]) -> dict[str, Variant]:
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{file}: variants is {shown(tree)}; write names with settings below each")
    variants = {}
    for name, content in tree.items():
        place = f"{file}: variant {name!r}"
        content = content or {}
        if not isinstance(name, str) or not isinstance(content, dict):
            raise UserError(f"{place} holds {shown(content)}; write control, settings and tune below its name")
        _known(content, VARIANT_KEYS, f"{place}: ")
        settings = _settings(content.get("settings", {}), f"{place}: settings")
        grid = _grid(content.get("tune", {}), f"{place}: tune")
        if twice := sorted(settings.keys() & grid.keys()):
            raise UserError(f"{place}: {twice[0]} is in settings and in tune; write it in one of them")
        variant_units = _units(content.get("budget", list(units)), units, f"{place}: budget")
        seconds = content.get("seconds_per_step")
        if seconds is not None and (_number(seconds) or 0) <= 0:
            raise UserError(f"{place}: seconds_per_step is {shown(seconds)}; write a positive number")
        control = content.get("control")
        variants[name] = Variant(name, control, settings, grid, variant_units, seconds and float(seconds))
    controls = {variant.control for variant in variants.values()}
    for variant in variants.values():
        if variant.control is None and variant.name not in controls:
            raise UserError(
                f"{file}: variant {variant.name!r} has no control; write control: with the name of the variant that it "
                "is to be compared with"
            )
        if variant.control is not None and (variant.control not in variants or variant.control == variant.name):
            others = [name for name in variants if name != variant.name]
            raise UserError(
                f"{file}: the control of {variant.name!r} is {variant.control!r}; write one of {', '.join(others)}"
            )
        _check_chain(file, variant, variants)
        compared = variants[variant.control].units if variant.control else variant.units
        if more := [unit for unit in variant.units if unit not in compared]:
            raise UserError(
                f"{file}: variant {variant.name!r} is compared at equal {more[0]} but its control {variant.control!r} "
                f"is not; write {more[0]} in the budget of {variant.control!r} too"
            )
    return variants


def _check_chain(file: Path, variant: Variant, variants: Mapping[str, Variant]) -> None:
    """Each chain of controls must end."""
    chain, control = [variant.name], variant.control
    while control is not None and control in variants:
        if control in chain:
            raise UserError(
                f"{file}: the controls of {', '.join(chain)} form a circle; leave control out of the one that all "
                "others are to be compared with"
            )
        chain.append(control)
        control = variants[control].control


def _settings(tree: Any, place: str) -> dict[str, str]:
    """Settings by dotted key, from dotted keys or nested sections."""
    if not isinstance(tree, dict):
        raise UserError(f"{place} is {shown(tree)}; write settings such as optimizer.lr: 1e-3, one a line")
    settings: dict[str, str] = {}
    for key, value in tree.items():
        inner = {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
        whole = {str(key): value} if str(key) in SETTINGS else inner
        settings |= {_setting(str(name), place): _text(each) for name, each in whole.items()}
    return settings


def _grid(tree: Any, place: str) -> dict[str, tuple[str, ...]]:
    if not isinstance(tree, dict):
        raise UserError(f"{place} is {shown(tree)}; write lists such as optimizer.lr: [1e-3, 2e-3]")
    grid = {}
    for key, values in tree.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{place}: {key} is {shown(values)}; write a list of values, such as [1e-3, 2e-3]")
        grid[_setting(str(key), place)] = tuple(dict.fromkeys(_text(value) for value in values))
    return grid


def _number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def _text(value: Any) -> str:
    """A value as a command-line argument."""
    return value if isinstance(value, str) else shown(value)


def _setting(key: str, place: str) -> str:
    if key in RESERVED:
        of = {"run.seed": "seeds", "train.steps": "budget"}.get(key, "dir")
        raise UserError(f"{place}: {key} is given by the study; write {of} at the top of the file")
    _known([key], SETTINGS, f"{place}: ")
    return key


def _budget(file: Path, tree: Any) -> dict[Unit, float | None]:
    if not isinstance(tree, dict):
        raise UserError(f"{file}: budget is {shown(tree)}; write tokens: 1e9, flops: control or seconds: control")
    _known(tree, UNITS, f"{file}: budget: ")
    budget: dict[Unit, float | None] = {}
    for unit in UNITS:
        if unit not in tree:
            continue
        value = tree[unit]
        if value == "control" and unit != "tokens":
            budget[unit] = None
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            budget[unit] = float(value)
        else:
            also = "" if unit == "tokens" else ", or control"
            raise UserError(f"{file}: budget.{unit} is {shown(value)}; write a positive number{also}")
    return budget


def _units(values: Any, units: tuple[Unit, ...], place: str) -> tuple[Unit, ...]:
    """Units of a variant. Always include tokens, because the length of all other runs is derived from those."""
    if not isinstance(values, list):
        raise UserError(f"{place} is {shown(values)}; write a list of units, such as [tokens]")
    for value in values:
        if value not in units:
            raise UserError(f"{place} holds {shown(value)}; write some of {', '.join(units)}, as in the study's budget")
    return tuple(unit for unit in units if unit == "tokens" or unit in values)


def _seeds(values: Any, place: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not values or any(type(seed) is not int or seed < 0 for seed in values):
        raise UserError(f"{place} is {shown(values)}; write a list of whole numbers from 0 on, such as [0, 1, 2]")
    if len({*values}) < len(values):
        raise UserError(f"{place} is {shown(values)}; write each seed once")
    return tuple(values)


def _whole(value: Any, place: str) -> int:
    if type(value) is not int or value < 1:
        raise UserError(f"{place} is {shown(value)}; write a whole number of at least 1")
    return value


def _known(names: Iterable[Any], known: Collection[str], place: str) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{place}unknown {name!r}{nearest(str(name), known)}")
