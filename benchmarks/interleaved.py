"""Time variants in turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from rich.progress import track

Variants = Mapping[str, Callable[[], Any]]


class Seconds(NamedTuple):
    """Times of a variant: by the clock, and of the CPU, in all threads of the process where nothing else is said."""

    wall: float
    cpu: float


def all_seconds(
    variants: Variants,
    rounds: int,
    *,
    cpu_time: Callable[[], float] = time.process_time,
    after: Callable[[], None] = lambda: None,
) -> dict[str, list[Seconds]]:
    """Times of each variant in each of `rounds` rounds, every round running each of them once, in this order.

    One round before the first warms up and is not counted.

    Args:
        cpu_time: `time.thread_time` for the CPU time of this thread alone.
        after: called after each run, and not timed.
    """

    def timed(run: Callable[[], Any]) -> Seconds:
        wall, cpu = time.perf_counter(), cpu_time()
        run()
        taken = Seconds(time.perf_counter() - wall, cpu_time() - cpu)
        after()
        return taken

    return in_turns(variants, rounds, timed)


def median_seconds(variants: Variants, rounds: int, **others: Any) -> dict[str, Seconds]:
    """Median times of each variant, as of `all_seconds`."""
    return {name: median_of(times) for name, times in all_seconds(variants, rounds, **others).items()}


def median_of(times: Iterable[Seconds]) -> Seconds:
    """Medians of wall and of CPU time."""
    return Seconds(*(statistics.median(column) for column in zip(*times, strict=True)))


def median_event_seconds(
    variants: Variants, rounds: int, *, before: Callable[[], Any] = lambda: None
) -> dict[str, float]:
    """As `median_seconds`, by events on the current CUDA stream.

    Args:
        before: called before each run, and not timed.
    """

    def timed(run: Callable[[], Any]) -> float:
        before()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return {name: statistics.median(times) for name, times in in_turns(variants, rounds, timed).items()}


def in_turns[Name, Run, Time](
    variants: Mapping[Name, Run], rounds: int, timed: Callable[[Run], Time]
) -> dict[Name, list[Time]]:
    """What `timed` says of each variant in each of `rounds` rounds, as of `all_seconds`."""
    taken: dict[Name, list[Time]] = {name: [] for name in variants}
    turns: Iterable[int] = track(range(rounds + 1), description="rounds", transient=True)
    for turn in turns:
        for name, run in variants.items():
            measured = timed(run)
            if turn:
                taken[name].append(measured)
    return taken
