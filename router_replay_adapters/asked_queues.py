"""Whether the routers of a stack ask for what was recorded for them: a router that never does routes by itself.

Neither miles nor slime looks at that. A router asks for nothing where its top-k is inside of a fused kernel, or where a
CUDA graph repeats what it did when the graph was captured.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any
from weakref import WeakSet

from router_replay.errors import CallOrderError, UnsupportedError


class AskedQueues:
    """The queues of a stack that were asked for experts since they were cleared last."""

    def __init__(self, stack: str) -> None:
        self._stack = stack
        self._asked: WeakSet[Any] = WeakSet()

    def add(self, queue: object) -> None:
        """A router takes its experts from this queue."""
        self._asked.add(queue)

    def around_clear_all(self, queues: Callable[..., Iterable[Any]]) -> Callable[..., Callable[..., None]]:
        """Wrapper of what a stack calls at the end of a step: it refuses queues that nobody asked.

        Args:
            queues: the stack's, by what its `clear_all` is called with.
        """

        def wrap(clear_all: Callable[..., None]) -> Callable[..., None]:
            @wraps(clear_all)
            def wrapped(*args: Any) -> None:
                try:
                    self._require(queues(*args))
                finally:
                    self._asked.clear()
                    clear_all(*args)

            return wrapped

        return wrap

    def _require(self, queues: Iterable[Any]) -> None:
        filled = [queue for queue in queues if queue.top_indices_list]
        silent = sum(queue not in self._asked for queue in filled)
        if silent:
            raise CallOrderError(
                f"{silent} of {len(filled)} routers of {self._stack} did not ask for the experts that were recorded for"
                " them, so that they chose by themselves: turn off what keeps their top-k from being called, such as"
                " moe_router_fusion and CUDA graphs around MoE layers"
            )


def refuse_settings(stack: str, args: Namespace) -> None:
    """Refuse a stack's arguments under which routers take no recorded experts, or those of other tokens.

    Raises:
        UnsupportedError: such an argument.
    """
    if getattr(args, "moe_router_fusion", False):
        raise UnsupportedError(
            f"{stack} cannot replay with --moe-router-fusion: a fused router asks for no recorded experts; take the"
            " flag away"
        )
    padded, of_several = getattr(args, "qkv_format", "thd") == "bshd", getattr(args, "micro_batch_size", 1) != 1
    if padded and of_several:
        raise UnsupportedError(
            f"{stack} cannot replay with --qkv-format bshd and --micro-batch-size {args.micro_batch_size}: it lays rows"
            " out sequence by sequence, where the model's routers see position by position; take a micro-batch size of"
            " 1, or thd"
        )
