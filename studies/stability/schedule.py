"""Which run goes on next."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from studies.stability.protocol import PIECE, Run


def next_piece(blocks: Sequence[Sequence[Run]], done: Callable[[Run], int]) -> tuple[Run, int] | None:
    """The run whose turn it is, and the step that it goes on to; None when all are finished.

    In the first block that has an unfinished run, that one which has the fewest whole pieces, in the block's order.

    Args:
        done: steps that a run has behind it.
    """
    for block in blocks:
        waiting = [run for run in block if done(run) < run.num_steps]
        if waiting:
            run = min(waiting, key=lambda run: done(run) // PIECE)
            return run, min(run.num_steps, (done(run) // PIECE + 1) * PIECE)
    return None
