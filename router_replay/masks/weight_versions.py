"""Runs of weight versions: from which position of a sequence on which weights computed the rows."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from router_replay.errors import InputError, PairingError

Runs = tuple[tuple[int, str], ...]
"""(position, version): that version from that position on, up to the next run. Rows before the first run are of
weights that nobody named."""


def require_runs(runs: Any, start: int, end: int) -> Runs:
    """Runs of rows [start, end), as a tuple of tuples.

    Raises:
        InputError: not pairs of an integer and a text, or positions that do not ascend within [start, end).
    """
    try:
        checked = tuple((operator.index(position), version) for position, version in runs)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"weight_versions is {str(runs)[:80]}, but must be pairs (position, version): ((0, 'step 7'), ...)"
        ) from error
    for _, version in checked:
        if not isinstance(version, str):
            raise InputError(
                f"weight_versions names the weights {version!r}, a {type(version).__name__}, but a version is text"
            )
    positions = [position for position, _ in checked]
    if positions != sorted(set(positions)) or any(not start <= position < end for position in positions):
        raise InputError(f"weight_versions begin at positions {positions}, which must ascend within [{start}, {end})")
    return checked


def runs_within(runs: Runs, start: int, end: int) -> Runs:
    """Those of the runs that reach into [start, end); the one that `start` falls into begins there."""
    if start >= end:
        return ()
    before = [version for position, version in runs if position <= start]
    first = ((start, before[-1]),) if before else ()
    return first + tuple((position, version) for position, version in runs if start < position < end)


def joined_runs(parts: Sequence[tuple[Runs, int, Tensor]]) -> Runs:
    """Runs of adjacent parts `(runs, start, valid)`, as those of one sequence.

    Raises:
        PairingError: valid rows of weights that nobody named come after named ones, whose they would seem to be.
    """
    joined: list[tuple[int, str]] = []
    for number, (runs, start, valid) in enumerate(parts):
        stated_from = runs[0][0] if runs else start + len(valid)
        if joined and bool(valid[: stated_from - start].any()):
            raise PairingError(
                f"part {number} does not say which weights computed its valid rows before position {stated_from},"
                " but parts before it do: joined, those rows would seem to be theirs"
            )
        for position, version in runs:
            if not joined or joined[-1][1] != version:
                joined.append((position, version))
    return tuple(joined)
