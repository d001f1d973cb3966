"""Time variants in turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.progress import track


def median_seconds(variants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median wall-clock seconds of each variant over `rounds` rounds, every round running each of them once.

    One round before the first warms up and is not counted.
    """
    taken: dict[str, list[float]] = {name: [] for name in variants}
    turns: Iterable[int] = track(range(rounds + 1), description="rounds", transient=True)
    for turn in turns:
        for name, run in variants.items():
            begin = time.perf_counter()
            run()
            if turn:
                taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in taken.items()}
