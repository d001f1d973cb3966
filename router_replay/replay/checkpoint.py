"""Bindings that ride in activation checkpoints.

A checkpointed function runs twice: in the forward pass, and again in backward, after the block of its microbatch has
ended and possibly inside another's. So what was bound in its forward pass travels with it.

The three wrappers are of the three forms that checkpoints have; what they wrap is in a ledger of its upstream. They
hold references only, and pass their calls through when nothing is bound.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from router_replay.errors import CallOrderError
from router_replay.replay.binding import Frame, State, current, entered

Function = Callable[..., Any]


class Checkpoint:
    """One activation checkpoint: the bindings of its forward pass, for each run of its function.

    Its two frames have one set of native choices, so that a recompute takes those of the forward pass. They are two,
    since a recompute may begin before the forward pass has ended: a backward pass inside of a checkpointed function.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._forward = Frame(recomputing=False)
        self._recompute = Frame(recomputing=True, native_choices=self._forward.native_choices)

    @classmethod
    def here(cls) -> Checkpoint | None:
        """A checkpoint whose forward pass runs now; None where nothing is bound."""
        state = current()
        return cls(state) if state.bindings else None

    def forward(self) -> AbstractContextManager[None]:
        """Context of the forward pass."""
        return entered(replace(self._state, frames=(*self._state.frames, self._forward)))

    @contextlib.contextmanager
    def recompute(self) -> Iterator[None]:
        """Context of a recompute, whatever is bound around it.

        Raises:
            CallOrderError: a replay that was bound has been removed.
        """
        if not all(replay.attached for replay in self._state.bindings):
            raise CallOrderError(
                "activations of a forward pass under replay are recomputed, but the replay was removed since: the "
                "recompute would route otherwise than the forward pass did; call remove() after the backward pass"
            )
        # Checkpoints around the forward pass have their own recomputes, and this one's choices are in its own frame.
        with entered(replace(self._state, frames=(self._recompute,))):
            yield


def carry(run_function: Function) -> Function:
    """`run_function` with the current bindings entered in every later call; itself when nothing is bound.

    The first call is the checkpoint's forward pass, every later one a recompute of it.

    Raises:
        CallOrderError: by the wrapped function, in a recompute after a replay that was bound had been removed.
    """
    checkpoint = Checkpoint.here()
    if checkpoint is None:
        return run_function
    context = checkpoint.forward

    def run_in_its_own_state(*args: Any, **kwargs: Any) -> Any:
        nonlocal context
        with context():
            result = run_function(*args, **kwargs)
        context = checkpoint.recompute
        return result

    return run_in_its_own_state


def carried_by_forward(forward: Function) -> Function:
    """The forward of an autograd function that keeps its `run_function` and calls it again in backward."""

    @functools.wraps(forward)
    def forward_with_bindings(ctx: Any, run_function: Function, *args: Any) -> Any:
        return forward(ctx, carry(run_function), *args)

    return forward_with_bindings


def carried_by_generator(generator: Function) -> Function:
    """A generator around a forward pass, whose first argument is the function that its unpack hooks call in backward.

    A caller's own contexts, which hold for the same two runs, are left as they are: torch asks whether they are modes
    of selective checkpointing, and refuses others with debug=True.
    """

    @functools.wraps(generator)
    def generator_with_bindings(run_function: Function, *args: Any, **kwargs: Any) -> Iterator[None]:
        checkpoint = Checkpoint.here()
        if checkpoint is None:
            return generator(run_function, *args, **kwargs)

        def recompute(*args: Any, **kwargs: Any) -> None:
            with checkpoint.recompute():
                run_function(*args, **kwargs)

        return _within(checkpoint.forward(), generator(recompute, *args, **kwargs))

    return generator_with_bindings


def carried_by_contexts(contexts: Function) -> Function:
    """A function that is asked for the contexts of a forward pass and of its recompute."""

    @functools.wraps(contexts)
    def contexts_with_bindings(
        *args: Any, **kwargs: Any
    ) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        forward, recompute = contexts(*args, **kwargs)
        checkpoint = Checkpoint.here()
        if checkpoint is None:
            return forward, recompute
        return _both(checkpoint.forward(), forward), _both(checkpoint.recompute(), recompute)

    return contexts_with_bindings


def _within(context: AbstractContextManager[None], generator: Iterator[None]) -> Iterator[None]:
    with context:
        yield from generator


@contextlib.contextmanager
def _both(ours: AbstractContextManager[Any], theirs: AbstractContextManager[Any]) -> Iterator[None]:
    with ours, theirs:
        yield
