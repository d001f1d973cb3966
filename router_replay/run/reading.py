"""A run's steps from its files, one step in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from router_replay.errors import DataError, InputError
from router_replay.run.json_lines import SUFFIXES, read_json_lines
from router_replay.run.step import RunStep
from router_replay.run.step_files import read_place, read_step

RUN_SUFFIXES = (".safetensors", *SUFFIXES)
"""Of a run's files."""


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The files of a run: those that are named, and those directly in the folders that are.

    Raises:
        DataError: a path that is not there, a folder without a file of a run, or a file of another kind.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            # What begins with a dot is being written.
            found = sorted(each for each in path.iterdir() if _is_run_file(each) and not each.name.startswith("."))
            if not found:
                raise DataError(f"{path}: a folder without a file of a run, which ends with {', '.join(RUN_SUFFIXES)}")
            files += found
        elif not path.is_file():
            raise DataError(f"{path}: no such file or folder")
        elif not _is_run_file(path):
            raise DataError(f"{path}: a file of a run ends with {', '.join(RUN_SUFFIXES)}")
        else:
            files.append(path)
    return files


def read_run(
    files: Sequence[Path],
    on_file: Callable[[Path], None] = lambda path: None,
    on_shared: Callable[[int, tuple[Path, ...]], None] = lambda step, paths: None,
) -> Iterator[RunStep]:
    """Steps in the order of their numbers; what several files hold of one step is joined.

    Safetensors files are read when their step's turn comes, JSON lines all at the beginning: they are for small runs.

    Args:
        on_file: called with every file that has been read.
        on_shared: called with the number of a step that is in several files, of which one or more are JSON lines, and
            these files. JSON lines do not say whether they are parts of one run's step, or steps of two runs.

    Raises:
        DataError: a file that cannot be read; two files that hold the same part of a step; parts that do not fit.
    """
    lines: dict[int, list[RunStep]] = {}
    line_files: dict[int, tuple[Path, ...]] = {}
    places: dict[tuple[int, int], Path] = {}
    for path in dict.fromkeys(files):
        if path.name.endswith(SUFFIXES):
            for record in read_json_lines(path):
                lines.setdefault(record.step, []).append(record)
                line_files[record.step] = (*line_files.get(record.step, ()), path)
            on_file(path)
            continue
        place = read_place(path)
        if place in places:
            raise DataError(
                f"{places[place]} and {path} both hold part {place[1]} of step {place[0]}: make one report for each"
                " run, and give every rank's write_step a part of its own"
            )
        places[place] = path
    paths: dict[int, list[Path]] = {}
    for step, part in sorted(places):
        paths.setdefault(step, []).append(places[step, part])
    for step in sorted({*lines, *paths}):
        records = lines.pop(step, [])
        sources = (*line_files.get(step, ()), *paths.get(step, ()))
        if records and len(sources) > 1:
            on_shared(step, sources)
        for path in paths.get(step, []):
            records.append(read_step(path))
            on_file(path)
        try:
            joined = RunStep.join(records)
        except InputError as error:
            raise DataError(f"step {step}: {error}") from error
        yield joined


def _is_run_file(path: Path) -> bool:
    return path.is_file() and path.name.endswith(RUN_SUFFIXES)
