"""Bindings that ride in Megatron's activation checkpoints.

A checkpointed function runs twice: in forward without gradients, and again in backward, after the `with` block of
its microbatch has ended and possibly after other microbatches ran. Every checkpoint whose body can hold a router goes
through `CheckpointFunction`: full recompute, selective recompute of MoE layers or of whole layers.
(`CheckpointWithoutOutput` wraps layer norms, activations and projections only, never a router.) So its
`run_function` is wrapped when it is stored, and the state travels with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.tensor_parallel.random import CheckpointFunction

from router_replay.errors import CallOrderError
from router_replay.replay import binding as scope


def carry(run_function: Callable[..., Any]) -> Callable[..., Any]:
    """`run_function` with the current bindings re-entered on every later call; itself when nothing is bound."""
    state = scope.current()
    if not state.bindings:
        return run_function
    frame = scope.Frame()

    def run_in_its_own_state(*args: Any) -> Any:
        if frame.recomputing:
            _require_attached(state)
        outer = scope.current().frames if not frame.recomputing else ()
        with scope.entered(scope.State(state.bindings, (*outer, frame))):
            result = run_function(*args)
        frame.recomputing = True
        return result

    return run_in_its_own_state


def _require_attached(state: scope.State) -> None:
    for replay in state.bindings:
        if not replay.attached:
            raise CallOrderError(
                "activations of a forward pass under replay are recomputed, but the replay was removed since: the "
                "recompute would route otherwise than the forward pass did; call remove() after the backward pass"
            )


class CheckpointPatch:
    """Wraps `CheckpointFunction.forward` while at least one replay is attached.

    `apply` and `remove` count their callers; the first puts the wrapper in, the last takes it out.
    """

    def __init__(self) -> None:
        self._users = 0
        self._original: Any = None

    def apply(self) -> None:
        """Put the wrapper in, unless it is there already."""
        self._users += 1
        if self._users > 1:
            return
        self._original = CheckpointFunction.__dict__["forward"]
        forward = self._original.__func__

        def forward_with_bindings(
            ctx: Any, run_function: Callable[..., Any], distribute_saved_activations: bool, *args: Any
        ) -> Any:
            return forward(ctx, carry(run_function), distribute_saved_activations, *args)

        CheckpointFunction.forward = staticmethod(forward_with_bindings)

    def remove(self) -> None:
        """Take the wrapper out once nobody needs it."""
        self._users -= 1
        if self._users == 0:
            CheckpointFunction.forward = self._original
            self._original = None


CHECKPOINT_PATCH = CheckpointPatch()
