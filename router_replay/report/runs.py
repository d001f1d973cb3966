"""Which of the paths that are named are a run's, and what it is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def named_runs(paths: Sequence[Path], names: Sequence[str] = ()) -> list[tuple[str, list[Path]]]:
    """Runs by name. With names each path is a run of its own, and so it is if two of them are folders; else all paths
    together are one run: its files, or its folder and more of them.

    Args:
        names: one for each path, or none. By default a path's own, with that of the folder above where two are alike.
    """
    if names:
        return [(name, [path]) for name, path in zip(names, paths, strict=True)]
    if sum(path.is_dir() for path in paths) < 2:
        return [(_name(paths[0], 1), list(paths))]
    depth = 1
    while depth < 8 and len({_name(path, depth) for path in paths}) < len({path.resolve() for path in paths}):
        depth += 1
    return [(_name(path, depth), [path]) for path in paths]


def _name(path: Path, depth: int) -> str:
    """The last parts of a path, without endings of files."""
    parts = path.resolve().parts[1:][-depth:]
    return "/".join([*parts[:-1], parts[-1] if path.is_dir() else parts[-1].partition(".")[0]])
