"""Whether the routers of a stack take what was recorded for them: a router that does not ask routes by itself.

Neither miles nor slime looks at that. A router asks for nothing where its top-k is inside of a fused kernel, and where
a CUDA graph repeats what it did when the graph was captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from router_replay.errors import CallOrderError

Queues = Callable[..., Iterable[Any]]
"""The queues of a stack's routers, by what its `clear_all` is called with."""


def around_clear_all(stack: str, queues: Queues) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Of what a stack calls at the end of a step: it refuses queues that are not taken to their end.

    A pass of old log-probabilities does not count, behind which a stack begins its queues anew.
    """

    def wrap(clear_all: Callable[..., None]) -> Callable[..., None]:
        @wraps(clear_all)
        def wrapped(*args: Any) -> None:
            try:
                _require_taken(stack, queues(*args))
            finally:
                clear_all(*args)

        return wrapped

    return wrap


def _require_taken(stack: str, queues: Iterable[Any]) -> None:
    filled = [queue for queue in queues if queue.top_indices_list]
    # Where a schedule's forward passes look like recomputes it is the other index that counts them.
    left = sum(max(queue.forward_index, queue.backward_index) < len(queue.top_indices_list) for queue in filled)
    if left:
        raise CallOrderError(
            f"{left} of {len(filled)} routers of {stack} did not ask for all experts that were recorded for them, and"
            " chose by themselves: turn off what keeps their top-k from being called, such as moe_router_fusion and"
            " CUDA graphs around MoE layers"
        )
