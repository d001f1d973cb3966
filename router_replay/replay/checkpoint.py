"""Bindings that ride in activation checkpoints.

A checkpointed function runs twice: in forward without gradients, and again in backward, after the block of its
microbatch has ended and possibly after other microbatches ran. So the function is wrapped when it is stored, and the
state travels with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from router_replay.errors import CallOrderError
from router_replay.replay.binding import Frame, State, current, entered


def carry(run_function: Callable[..., Any]) -> Callable[..., Any]:
    """`run_function` with the current bindings re-entered on every later call; itself when nothing is bound.

    The first call is the checkpoint's forward pass, every later one a recompute of it.

    Raises:
        CallOrderError: by the wrapped function, in a recompute after a replay that was bound had been removed.
    """
    state = current()
    if not state.bindings:
        return run_function
    frame = Frame()

    def run_in_its_own_state(*args: Any) -> Any:
        if frame.recomputing:
            _require_attached(state)
        outer = current().frames if not frame.recomputing else ()
        with entered(State(state.bindings, (*outer, frame))):
            result = run_function(*args)
        frame.recomputing = True
        return result

    return run_in_its_own_state


def _require_attached(state: State) -> None:
    if not all(replay.attached for replay in state.bindings):
        raise CallOrderError(
            "activations of a forward pass under replay are recomputed, but the replay was removed since: the "
            "recompute would route otherwise than the forward pass did; call remove() after the backward pass"
        )
