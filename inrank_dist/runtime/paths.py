"""Path queries that treat only "does not exist" as absence.

``Path.exists``, ``is_dir``, ``is_file``, ``glob`` and ``rglob`` also report some errors (in newer Pythons all of them)
as absence: a stale network file handle, missing permission, a failing disk. A run must not start over because of that.
"""

import os
import stat
from pathlib import Path


def status(path: Path, *, follow_links: bool = True) -> os.stat_result | None:
    """``stat`` of a path; None if nothing exists there, or only a broken link.

    Raises:
        OSError: any error except a missing file.
    """
    try:
        return path.stat(follow_symlinks=follow_links)
    except FileNotFoundError:
        return None


def is_folder(path: Path) -> bool:
    """Whether the path is a folder or a link to one.

    Raises:
        OSError: any error except a missing file.
    """
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_plain_file(path: Path) -> bool:
    """Whether the path is a regular file, not a link.

    Raises:
        OSError: any error except a missing file.
    """
    found = status(path, follow_links=False)
    return found is not None and stat.S_ISREG(found.st_mode)


def content_of(folder: Path) -> list[Path]:
    """Entries of a folder, sorted; empty if the folder does not exist.

    Raises:
        OSError: the folder cannot be listed, or is a broken link, which was meant to lead somewhere.
    """
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        if status(folder, follow_links=False) is not None:
            raise
        return []
