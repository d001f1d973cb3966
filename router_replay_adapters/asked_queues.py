"""Whether the routers of a stack take what was recorded for them: a router that does not ask routes by itself.

Neither miles nor slime looks at that. A router asks for nothing where its top-k is inside of a fused kernel, and where
a CUDA graph repeats what it did when the graph was captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any
from weakref import WeakSet

from router_replay.errors import CallOrderError

Queues = Callable[..., Iterable[Any]]
"""The queues of a stack's routers, by what its `clear_all` is called with."""


class AskedQueues:
    """The queues of a stack that its routers asked for in a step, by what this package's wrapper has seen.

    The stack's own indices count what was taken, also by whoever goes past that wrapper.
    """

    def __init__(self, stack: str, queues: Queues) -> None:
        self._stack = stack
        self._queues = queues
        self._seen: WeakSet[Any] = WeakSet()

    def note(self, queue: Any) -> None:
        """A router asks for experts of this queue, and may be given its own in unknown rows."""
        self._seen.add(queue)

    def around_clear_all(self, clear_all: Callable[..., None]) -> Callable[..., None]:
        """Of what a stack calls at the end of a step: it refuses queues that are not taken to their end, and by us.

        A pass of old log-probabilities does not count, behind which a stack begins its queues anew.
        """

        @wraps(clear_all)
        def wrapped(*args: Any) -> None:
            queues = list(self._queues(*args))
            try:
                self._require_taken([queue for queue in queues if queue.top_indices_list])
            finally:
                self._seen.difference_update(queues)
                clear_all(*args)

        return wrapped

    def _require_taken(self, filled: list[Any]) -> None:
        # Where a schedule's forward passes look like recomputes it is the other index that counts them.
        left = sum(max(queue.forward_index, queue.backward_index) < len(queue.top_indices_list) for queue in filled)
        if left:
            raise CallOrderError(
                f"{left} of {len(filled)} routers of {self._stack} did not ask for all experts that were recorded for"
                " them, and chose by themselves: turn off what keeps their top-k from being called, such as"
                " moe_router_fusion and CUDA graphs around MoE layers"
            )
        past = sum(queue not in self._seen for queue in filled)
        if past:
            raise CallOrderError(
                f"{past} of {len(filled)} routers of {self._stack} took what was recorded for them past"
                f" router_replay_adapters.{self._stack}, which gives them their own experts in unknown rows: something"
                f" got {self._stack}'s top-k before the adapter was there; have it look it up in each call, or after"
                " --custom-megatron-init-path was called"
            )
