"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write to a temporary name beside `path`, then rename it: a reader never sees half of it.

    The file has the permissions of any new file, by the umask, whatever `write` makes of them.

    Args:
        path: the file; its folder is made where it is missing, and a file of that name is replaced.
        write: called with the temporary path of an empty file, which begins with a dot and has the suffix of `path`.

    Raises:
        OSError: the folder or the file cannot be written. What was there before stays, and nothing half-written does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)
        write(partial)
        # Some writers rename a private file of their own onto it, which the umask has not been applied to.
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
