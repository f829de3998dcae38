"""The non-tensor state in a checkpoint: one JSON file, which is read before the model is built."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from ...lowrank.convert import LayerLayout, Layout
from .folder import as_json
from .listing import Damaged, read_error, step_of

STATE = "state.json"


@dataclass(frozen=True)
class TrainState:
    """All non-tensor state of a run. Learning rate and dropout are functions of seed, step and process, so neither the
    schedule nor a random state is saved.

    Attributes:
        step: optimizer steps completed, including skipped ones.
        optimizer_steps: steps in which the optimizer updated the parameters; Adam's ``step``.
        tokens: tokens trained on.
        seconds: training time so far.
        flops: floating-point operations so far, forward and backward; None if unknown.
        train_loss: last one logged.
        evaluation_due: whether the evaluation of this step has not been done yet.
        layout: the rank table, from which the model is built before any tensor is read.
        ranks, loader, health: state of the respective component.
        vocab_size, fingerprint, unigram_entropy, tokenizer: of the data and the tokenizer.
        world_size: number of processes that wrote the checkpoint.
        versions: of this program and its libraries.
        callbacks: name of a callback -> its state.
    """

    step: int
    optimizer_steps: int
    tokens: int
    seconds: float
    flops: int | None
    train_loss: float | None
    evaluation_due: bool
    layout: Layout
    ranks: dict[str, Any]
    loader: dict[str, Any]
    health: dict[str, Any]
    vocab_size: int
    fingerprint: str
    unigram_entropy: float
    tokenizer: str
    world_size: int
    versions: dict[str, str]
    callbacks: dict[str, Any] = field(default_factory=dict)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


KINDS: dict[str, Any] = get_type_hints(TrainState) | {
    "layout": {str: {"rank": int, "modes": int, "base": bool, "depth": int, "fixed_outer": bool}},
    "ranks": {
        "null": {"checks": int, "ranks": [(int, int, int)]},
        "explained": {str: float},
        "found": {str: int},
        "quiet": int,
        "frozen": bool,
        "stable_ranks": {"start": {str: _is_finite}, "last": {str: [_is_finite]}, "settled": [str]},
    },
    "loader": {"seed": int, "epoch": int, "sample_index": int, "fingerprint": str},
    "health": {"skipped": int, "in_a_row": int, "losses": [_is_finite]},
    "versions": {str: str},
    "callbacks": {str: lambda state: isinstance(state, dict)},
}
"""Schema of ``state.json``, down to every value: a wrong one must fail now and not many steps later, or never."""


def encode_state(state: TrainState) -> bytes:
    """The content of ``state.json``."""
    return as_json(asdict(state))


def read_state(folder: Path) -> TrainState:
    """Read ``state.json``.

    Raises:
        Damaged: a value is missing, unknown or of the wrong type, or the step is not that of the folder.
        Unreadable: the file cannot be read.
    """
    try:
        values = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if isinstance(values, dict) and isinstance(values.get("ranks"), dict):
            values["ranks"].setdefault("found", {})  # missing in checkpoints from before ranks were rounded
            values["ranks"].setdefault("stable_ranks", {"start": {}, "last": {}, "settled": []})  # from before these
            values.setdefault("callbacks", {})  # missing in checkpoints from before callbacks
            values.setdefault("flops", None)  # missing in checkpoints from before studies
            table = values.get("layout")
            for layer in table.values() if isinstance(table, dict) else ():
                if isinstance(layer, dict):  # missing in checkpoints from before deep layers
                    layer.setdefault("depth", 2)
                    layer.setdefault("fixed_outer", False)
        _check(values, KINDS, "it")
    except OSError as error:
        raise read_error(folder / STATE, error) from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{folder / STATE} is damaged ({error})") from None
    layout = {name: LayerLayout(**layer) for name, layer in values["layout"].items()}
    state = TrainState(**values | {"layout": layout})
    if state.step != step_of(folder):
        raise Damaged(f"{folder / STATE} is of step {state.step}, which is not the folder's; give it back its name")
    return state


def _check(value: Any, kind: Any, place: str) -> None:
    """Recursively check a value against a schema: a type (an int must not be negative), a predicate, or a dict, list or
    tuple of schemas.

    Raises:
        ValueError: with the location of the first value that does not match.
    """
    if isinstance(kind, dict) and isinstance(value, dict):
        any_name = kind.get(str)
        if not any_name and value.keys() != kind.keys():
            raise ValueError(f"{place} has too much or lacks {', '.join(sorted(value.keys() ^ kind.keys()))}")
        for name, each in value.items():
            _check(each, any_name or kind[name], name if place == "it" else f"{place}.{name}")
    elif isinstance(kind, (list, tuple)) and isinstance(value, list):
        kinds = kind * len(value) if isinstance(kind, list) else kind
        if len(kinds) != len(value):
            raise ValueError(f"{place} has {len(value)} values and should have {len(kinds)}")
        for index, (each, its_kind) in enumerate(zip(value, kinds, strict=True)):
            _check(each, its_kind, f"{place}[{index}]")
    elif not _fits(value, kind):
        raise ValueError(f"{place} is {value!r:.60}")


def _fits(value: Any, kind: Any) -> bool:
    if kind is int:
        return type(value) is int and value >= 0
    if kind in (float | None, int | None):
        return value is None or _fits(value, float if kind == float | None else int)
    if kind is float:
        return type(value) in (int, float)
    if kind in (bool, str):
        return type(value) is kind
    return callable(kind) and bool(kind(value))
