"""Expands paths and glob patterns to files. Folders that cannot be read raise an error instead of being skipped."""

import fnmatch
import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..runtime.errors import UserError
from ..runtime.home import expand_home, searched
from .readers import suffix_of


def find_files(setting: str, patterns: Iterable[str], suffixes: Iterable[str]) -> list[Path]:
    """Find the files that ``patterns`` match, each file once, sorted by name.

    A pattern that is an existing path is taken literally. Otherwise ``*``, ``?`` and ``[...]`` match within a name and
    ``**`` matches any number of folders. Names that begin with a dot are matched only by patterns that do. If a file
    has several names (relative and absolute, links), the first one is used.

    Args:
        setting: key of the setting with the patterns.
        suffixes: supported file suffixes.

    Raises:
        UserError: a pattern matches no file, an unsupported file or a broken link, or a folder cannot be read.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        matches = _matches(setting, pattern)
        files = [path for path in matches if _is_file(setting, path)]
        if not files and matches:
            advice = f"write {os.path.join(pattern, '**/*.txt')!r}, for example"
            if not any(os.path.isdir(match) for match in matches):
                raise UserError(f"data.{setting} has {pattern!r}, which is not a regular file; write the path of one")
            raise UserError(f"data.{setting} has {pattern!r}, a folder; {advice}")
        if not files:
            missing = "matches no file" if glob.has_magic(pattern) else "does not exist"
            raise UserError(
                f"data.{setting} has {pattern!r}, which {missing}{searched(pattern)}; write the path of a file or a "
                "glob"
            )
        for path in files:
            real = os.path.realpath(path)
            found[real] = min(found.get(real, path), path)
    paths = sorted(found.values())
    for path in paths:
        if suffix_of(path) not in suffixes:
            raise UserError(
                f"data.{setting} matches {path}, which is not supported; write only {', '.join(suffixes)} files"
            )
    return paths


def _matches(setting: str, pattern: str) -> list[Path]:
    if os.path.lexists(pattern):
        return [Path(pattern)]
    expanded = str(expand_home(pattern, f"data.{setting}"))
    if os.path.lexists(expanded):
        return [Path(expanded)]
    if not glob.has_magic(expanded):
        return []
    path = Path(expanded)
    parts = path.relative_to(path.anchor).parts
    return list(dict.fromkeys(_walk(setting, Path(path.anchor), parts)))


def _is_file(setting: str, path: Path) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        raise UserError(
            f"data.{setting} matches {path}, a broken link; write a pattern that does not match it, or fix the link"
        ) from None
    except OSError as error:
        raise _unreadable(setting, path, error) from error
    return os.path.isfile(path)


def _walk(setting: str, folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """Paths below ``folder`` whose components match ``parts``."""
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        yield from _walk(setting, folder, rest or ("*",))
        for name in _names(setting, folder):
            # Like Python's glob: do not enter folders that begin with a dot, but follow links.
            if not name.startswith(".") and os.path.isdir(folder / name) and not _is_loop(folder / name):
                yield from _walk(setting, folder / name, parts)
    elif glob.has_magic(part):
        matches = re.compile(fnmatch.translate(part)).match
        for name in _names(setting, folder):
            if matches(name) and (part.startswith(".") or not name.startswith(".")):
                yield from _walk(setting, folder / name, rest)
    elif os.path.lexists(folder / part):
        yield from _walk(setting, folder / part, rest)


def _names(setting: str, folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(setting, folder, error) from error


def _is_loop(folder: Path) -> bool:
    """Whether a folder is a link to one of its own parents."""
    if not folder.is_symlink():
        return False
    target = os.path.realpath(folder)
    inside = os.path.realpath(folder.parent)
    return inside == target or inside.startswith(target.rstrip("/") + "/")


def _unreadable(setting: str, path: Path, error: OSError) -> UserError:
    return UserError(
        f"data.{setting} leads to {path}, which cannot be read ({error.strerror}); make it readable, or write a "
        "pattern that does not lead there"
    )
