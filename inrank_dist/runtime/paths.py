"""What is at a path, where only "not there" means nothing.

``Path.exists``, ``is_dir``, ``is_file``, ``glob`` and ``rglob`` take some or, in newer Pythons, all trouble (a stale
handle of a network file system, no permission, a failing disk) for emptiness. A run must not start anew for that.
"""

import os
import stat
from pathlib import Path


def status(path: Path, *, follow_links: bool = True) -> os.stat_result | None:
    """The status of what is there; None: nothing is, or a link to nothing.

    Raises:
        OSError: that cannot be told.
    """
    try:
        return path.stat(follow_symlinks=follow_links)
    except FileNotFoundError:
        return None


def is_folder(path: Path) -> bool:
    """Whether a folder, or a link to one, is there.

    Raises:
        OSError: that cannot be told.
    """
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_plain_file(path: Path) -> bool:
    """Whether a file that is no link is there.

    Raises:
        OSError: that cannot be told.
    """
    found = status(path, follow_links=False)
    return found is not None and stat.S_ISREG(found.st_mode)


def content_of(folder: Path) -> list[Path]:
    """What is in a folder, by name; nothing in one that is not there.

    Raises:
        OSError: it cannot be listed; also a link to nothing, which somebody meant to lead somewhere.
    """
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        if status(folder, follow_links=False) is not None:
            raise
        return []
