"""Time variants in turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from rich.progress import track


class Seconds(NamedTuple):
    """Median times of a variant: by the clock, and of the CPU in all threads of the process."""

    wall: float
    cpu: float


def median_seconds(variants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Seconds]:
    """Median times of each variant over `rounds` rounds, every round running each of them once.

    One round before the first warms up and is not counted.
    """
    taken: dict[str, list[Seconds]] = {name: [] for name in variants}
    turns: Iterable[int] = track(range(rounds + 1), description="rounds", transient=True)
    for turn in turns:
        for name, run in variants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if turn:
                taken[name].append(Seconds(time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: Seconds(*(statistics.median(column) for column in zip(*times, strict=True)))
        for name, times in taken.items()
    }
