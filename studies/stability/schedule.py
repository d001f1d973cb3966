"""Which run goes on next, and that one process at a time goes on with it."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from studies.stability.protocol import PIECE, Run


def pieces(blocks: Sequence[Sequence[Run]], done: Callable[[Run], int]) -> Iterator[tuple[Run, int]]:
    """Unfinished runs, each with the step that it goes on to; whose turn it is comes first.

    Block after block, and in a block by the number of whole pieces, fewest first, in the block's order.

    Args:
        done: steps that a run has behind it.
    """
    for block in blocks:
        waiting = [(run, done(run)) for run in block]
        for run, steps in sorted(waiting, key=lambda each: each[1] // PIECE):
            if steps < run.num_steps:
                yield run, min(run.num_steps, (steps // PIECE + 1) * PIECE)


@contextlib.contextmanager
def claimed(found: Iterator[tuple[Run, int]], folder: Path) -> Iterator[tuple[Run, int] | None]:
    """The first of some pieces whose run nobody else goes on with, for as long as the block is open; None for none.

    Args:
        folder: where the runs' locks are; a process that dies leaves none locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for run, until in found:
        with open(folder / f"{run.name}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield run, until
            return
    yield None
