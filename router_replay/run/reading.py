"""A run's steps from its files, one step in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from router_replay.errors import DataError, InputError
from router_replay.mismatch.figures.diagnostics import DEFAULT_TAUS
from router_replay.run.json_lines import SUFFIXES, read_json_lines
from router_replay.run.step import RunStep
from router_replay.run.step_files import read_place, read_step, read_tally
from router_replay.run.step_tally import TAUS, StepTally, share_prompts

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
    """Steps in the order of their numbers, with their tokens; what several files hold of one step is joined.

    Safetensors files are read when their step's turn comes, JSON lines all at the beginning: they are for small runs.

    Args:
        on_file: called with every file that has been read.
        on_shared: called with the number of a step that is in several files, of which one or more are JSON lines, and
            these files. JSON lines do not say whether they are parts of one run's step, or steps of two runs.

    Raises:
        DataError: a file that cannot be read, or is without tokens; two files that hold the same part of a step; parts
            that do not fit.
    """
    for step, records, paths in _by_step(files, on_file, on_shared):
        yield _joined(step, [*records, *map(read_step, paths)], RunStep.join)
        for path in paths:
            on_file(path)


def read_tallies(
    files: Sequence[Path],
    on_file: Callable[[Path], None] = lambda path: None,
    on_shared: Callable[[int, tuple[Path, ...]], None] = lambda step, paths: None,
    *,
    passes: Sequence[str] = (),
    taus: Sequence[float] = (),
) -> Iterator[StepTally]:
    """The same without tokens, which are read only where the tallies of a step's files do not say all that they do.

    Args:
        on_file, on_shared: as of `read_run`.
        passes, taus: as of `StepTally.of`.

    Raises:
        DataError: as of `read_run`, but for files without tokens; of these, a tau that their tallies do not have.
    """
    for step, records, paths in _by_step(files, on_file, on_shared):
        found = [read_tally(path) for path in paths]
        tallies = [tally for tally, _ in found if tally is not None]
        enough = not records and len(tallies) == len(paths) and not _say_less(tallies, taus)
        if not enough and all(has_tokens for _, has_tokens in found):
            whole = _joined(step, [*records, *map(read_step, paths)], RunStep.join)
            yield StepTally.of(whole, passes=passes, taus=taus)
        else:
            _require_taus(taus, [path for (_, has_tokens), path in zip(found, paths, strict=True) if not has_tokens])
            parts = [tally or StepTally.of(read_step(path)) for (tally, _), path in zip(found, paths, strict=True)]
            yield _joined(step, [*parts, *map(StepTally.of, records)], StepTally.join)
        for path in paths:
            on_file(path)


def _say_less(tallies: Sequence[StepTally], taus: Sequence[float]) -> bool:
    """Whether a step's tokens would say more, or something else, than the tallies of its parts."""
    # The pass for which a step is refused may be one that was not asked for.
    return bool({*taus} - {*TAUS}) or share_prompts(tallies) or any(tally.refused for tally in tallies)


def _require_taus(taus: Sequence[float], without_tokens: Sequence[Path]) -> None:
    others = [tau for tau in taus if tau not in TAUS]
    if others and without_tokens:
        raise DataError(
            f"{without_tokens[0]}: has no tokens, and its tallies no F(tau) of tau {', '.join(map(str, others))}:"
            f" ask for {', '.join(map(str, DEFAULT_TAUS))}, or write the run's steps with their tokens"
        )


def _by_step(
    files: Sequence[Path],
    on_file: Callable[[Path], None],
    on_shared: Callable[[int, tuple[Path, ...]], None],
) -> Iterator[tuple[int, list[RunStep], list[Path]]]:
    """For each step its number, what JSON lines hold of it, and the safetensors files that hold parts of it."""
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
        yield step, records, paths.get(step, [])


def _joined[Step: (RunStep, StepTally)](step: int, parts: list[Step], join: Callable[[list[Step]], Step]) -> Step:
    try:
        return join(parts)
    except InputError as error:
        raise DataError(f"step {step}: {error}") from error


def _is_run_file(path: Path) -> bool:
    return path.is_file() and path.name.endswith(RUN_SUFFIXES)
