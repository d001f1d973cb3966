"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write to a temporary name beside `path`, then rename it: a reader never sees half of it.

    Args:
        path: the file; its folder is made where it is missing, and a file of that name is replaced.
        write: called with the temporary path, which begins with a dot and has the suffix of `path`.

    Raises:
        OSError: the folder or the file cannot be written. What was there before stays, and nothing half-written does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
