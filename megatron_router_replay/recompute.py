"""Megatron's activation checkpoints, made to carry the bindings of their forward pass.

Every checkpoint whose body can hold a router goes through `CheckpointFunction`: full recompute, selective recompute of
MoE layers or of whole layers. (`CheckpointWithoutOutput` wraps layer norms, activations and projections only, never a
router.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.tensor_parallel.random import CheckpointFunction

from router_replay.replay.checkpoint import carry


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
