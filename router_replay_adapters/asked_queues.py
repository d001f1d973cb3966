"""Whether the routers of a stack take what was recorded for them: a router that does not ask routes by itself.

Neither miles nor slime looks at that. A router asks for nothing where its top-k is inside of a fused kernel, and where
a CUDA graph repeats what it did when the graph was captured.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from router_replay.errors import CallOrderError, UnsupportedError

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
    # By releases of Megatron-Core: the last two are of older ones.
    impl = getattr(args, "cuda_graph_impl", None)
    older = [name for name in ("enable_cuda_graph", "external_cuda_graph") if getattr(args, name, False)]
    if impl not in (None, "none") or older:
        given = f"--cuda-graph-impl {impl}" if impl not in (None, "none") else older[0]
        raise UnsupportedError(
            f"{stack} cannot replay with {given}: a captured router repeats the routes of the capture; take the flag"
            " away"
        )
    padded, of_several = getattr(args, "qkv_format", "thd") == "bshd", getattr(args, "micro_batch_size", 1) != 1
    if padded and of_several:
        raise UnsupportedError(
            f"{stack} cannot replay with --qkv-format bshd and --micro-batch-size {args.micro_batch_size}: it lays rows"
            " out sequence by sequence, where the model's routers see position by position; take a micro-batch size of"
            " 1, or thd"
        )
