"""The shape of the house: which room may import which, and no file or class that is too large to read."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "inrank_dist"

BELOW: dict[str, set[str]] = {
    "runtime": set(),
    "lowrank": set(),  # torch and nothing of ours
    "models": {"lowrank", "runtime"},
    "hub": {"models", "lowrank", "runtime"},
    "optim": {"lowrank", "runtime"},
    "data": {"runtime"},
    "method": {"models", "lowrank", "runtime"},
    "engine": {"method", "optim", "models", "lowrank", "runtime"},
    "library": {"engine", "method", "optim", "models", "lowrank", "runtime"},
    "config": {"train", "engine", "method", "optim", "models", "data", "runtime"},  # of rooms their settings only
    "train": {"hub", "config", "engine", "method", "optim", "models", "data", "lowrank", "runtime"},
    "report": {"train", "runtime"},
    "bench": {"train", "config", "engine", "method", "optim", "models", "data", "lowrank", "runtime"},
    "study": {"report", "train", "config", "runtime"},
    "theory": {"report", "library", "lowrank", "runtime"},
    "commands": {
        "report",
        "bench",
        "hub",
        "study",
        "theory",
        "train",
        "config",
        "engine",
        "method",
        "models",
        "data",
        "lowrank",
        "runtime",
    },
    "launcher": {"commands", "config", "runtime"},
}
"""Room -> the rooms that it may import beside itself."""

MOST_LINES, MOST_METHODS = 400, 25
FILES = sorted(file for file in ROOT.rglob("*.py") if "__pycache__" not in file.parts)


def imported(file: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and module path, within the package, of everything of ours that a file imports."""
    package = file.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                base = package[: len(package) - node.level + 1] + module
            elif module[:1] == ("inrank_dist",):
                raise AssertionError(f"{file}:{node.lineno} imports absolutely; write a relative import")
            else:
                continue
            for name in node.names:
                yield node.lineno, (*base, name.name)


@pytest.mark.parametrize("room", BELOW)
def test_imports_point_one_way(room: str) -> None:
    files = [file for file in FILES if file.relative_to(ROOT).with_suffix("").parts[0] == room]
    assert files
    wrong = []
    for file in files:
        for line, path in imported(file):
            if path[0] not in BELOW or path[0] == room:
                assert path[0] in (room, "__version__"), f"{file}:{line} imports {path}, which is in no known room"
                continue
            if path[0] not in BELOW[room] or (room == "config" and not {"settings", "runtime", *SETTINGS} & {*path}):
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {'.'.join(path)}")
    assert not wrong, "\n".join(wrong)


SETTINGS = ("ModelSettings", "OptimizerSettings")


def test_every_room_is_known() -> None:
    rooms = {file.relative_to(ROOT).with_suffix("").parts[0] for file in FILES}
    assert rooms == {*BELOW, "__init__", "__main__"}


def test_files_and_classes_can_be_read() -> None:
    large = []
    for file in FILES:
        text = file.read_text()
        if (lines := len(text.splitlines())) > MOST_LINES:
            large.append(f"{file.relative_to(ROOT)} has {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(each, ast.FunctionDef) for each in node.body)
                if methods > MOST_METHODS:
                    large.append(f"{file.relative_to(ROOT)}: {node.name} has {methods} methods")
    assert not large, "\n".join(large)
