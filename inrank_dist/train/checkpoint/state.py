"""What a checkpoint holds beside tensors: one JSON file, read before the model is built."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

from ...lowrank.convert import LayerLayout, Layout
from .folder import as_json
from .listing import Damaged, step_of, trouble

STATE = "state.json"


@dataclass(frozen=True)
class TrainState:
    """Everything of a run that is no tensor. Learning rate and dropout follow from seed, step and process alone, so
    neither the schedule nor a random state has to be kept.

    Attributes:
        step: optimizer steps completed, those that were skipped included.
        optimizer_steps: those in which the optimizer moved; Adam's ``step``.
        tokens: tokens trained on.
        seconds: training time so far.
        flops: floating-point operations so far, forward and backward; None: not known.
        train_loss: last one logged.
        evaluation_due: whether the validation of this step is still to be done.
        layout: the rank table; the model is built from it before a tensor is read.
        ranks, loader, health: their states.
        vocab_size, fingerprint, unigram_entropy, tokenizer: of the data and of the tokenizer.
        world_size: processes that wrote it.
        versions: of this program and its libraries.
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


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


KINDS: dict[str, Any] = get_type_hints(TrainState) | {
    "layout": {str: {"rank": int, "modes": int, "base": bool}},
    "ranks": {
        "null": {"checks": int, "ranks": [(int, int, int)]},
        "explained": {str: float},
        "found": {str: int},
        "quiet": int,
        "frozen": bool,
    },
    "loader": {"seed": int, "epoch": int, "sample_index": int, "fingerprint": str},
    "health": {"skipped": int, "in_a_row": int, "losses": [_is_finite]},
    "versions": {str: str},
}
"""What ``state.json`` holds, to the last value: a wrong one must not come to light many steps later, or never."""


def encode_state(state: TrainState) -> bytes:
    """The content of ``state.json``."""
    return as_json(asdict(state))


def read_state(folder: Path) -> TrainState:
    """Read ``state.json``.

    Raises:
        Damaged: a value is missing, unknown or of the wrong type, or it is of another step than the folder.
        Unreadable: it cannot be read.
    """
    try:
        values = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if isinstance(values, dict) and isinstance(values.get("ranks"), dict):
            values["ranks"].setdefault("found", {})  # not yet there before ranks were rounded at the freeze
            values.setdefault("flops", None)  # not yet there before studies
        _check(values, KINDS, "it")
    except OSError as error:
        raise trouble(folder / STATE, error) from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{folder / STATE} is damaged ({error})") from None
    layout = {name: LayerLayout(**layer) for name, layer in values["layout"].items()}
    state = TrainState(**values | {"layout": layout})
    if state.step != step_of(folder):
        raise Damaged(f"{folder / STATE} is of step {state.step}, which is not the folder's; give it back its name")
    return state


def _check(value: Any, kind: Any, place: str) -> None:
    """Check a value, and all that is in it, against a kind: a type (numbers of type int are counts, so none is below
    zero), a predicate, or a dict, list or tuple of kinds.

    Raises:
        ValueError: with the place of the first value that is of another kind.
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
