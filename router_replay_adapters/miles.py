"""Rows that are unknown take the router's own experts in miles, which replays experts 0 to K - 1 there.

    --custom-megatron-init-path router_replay_adapters.miles.init

miles imports it in every process of its Megatron trainer. Its decoding, slicing and queues stay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from router_replay.upstream import Attribute, Ledger, Patch, Seam
from router_replay_adapters.asked_queues import AskedQueues
from router_replay_adapters.native_rows import NativeRows, replays
from router_replay_adapters.refusals import refuse_settings
from router_replay_adapters.stacks import STACKS, say_at_start

_OWN = "miles gives rows that are unknown to the router"
_MANAGER = "BaseReplayManager"
_TESTS = "tests/router_replay_adapters/test_unknown_rows.py"
_FORWARD_TEST = f"{_TESTS}::test_unknown_rows_are_native_and_known_ones_replayed"
_RECOMPUTE_TEST = f"{_TESTS}::test_a_recompute_takes_the_experts_of_its_forward_pass"

LEDGER = Ledger(
    distribution="miles-rl",
    title="miles",
    prefix="miles.utils.replay_base.",
    subject="the adapter for miles",
    tested=("0.0.2",),
    checked=(),
    way_out="take the adapter's --custom-megatron-init-path away and let no server answer with unknown rows",
    seams=(
        Seam(
            f"{_MANAGER}.get_topk_fn",
            ("old_topk_fn", "return_probs"),
            "wrapped by miles.with_native_rows",
            "what it returns is called by every router in the place of its top-k",
            _OWN,
        ),
        Seam(
            f"{_MANAGER}.get_current",
            (),
            "called by miles.with_native_rows",
            "it gives the queue of the router that is asked",
            _OWN,
        ),
        Seam(
            f"{_MANAGER}.set_current",
            ("replay",),
            "called by miles.with_native_rows",
            "it sets the queue that the next experts are taken from",
            _OWN,
        ),
        Seam(
            f"{_MANAGER}.clear_all",
            (),
            "wrapped by asked_queues.AskedQueues.around_clear_all",
            "it is called at the end of a step, whose queues it empties",
            _OWN,
        ),
        Seam(
            "Replay.pop_forward",
            (),
            "called by native_rows.NativeRows",
            "it gives the experts of the next forward pass",
            _OWN,
        ),
        Seam(
            "Replay.pop_backward",
            (),
            "called by native_rows.NativeRows",
            "it gives the experts of the next recompute",
            _OWN,
        ),
        Seam(
            "routing_replay_manager",
            None,
            "read by miles.with_native_rows",
            "it is the manager whose numbers are experts, others have token positions",
            _OWN,
        ),
    ),
    attributes=(
        *(
            Attribute(_MANAGER, name, "read by miles.with_native_rows", why, _FORWARD_TEST)
            for name, why in (
                ("enabled", "it tells whether there is replay at all"),
                ("replays", "it holds the queues"),
                ("stage", "it tells whether experts are replayed, and in which of the two passes"),
            )
        ),
        *(
            Attribute("Replay", name, "read by native_rows.NativeRows.filled", why, test)
            for name, why, test in (
                ("top_indices_list", "it holds the recorded tensor that comes next", _FORWARD_TEST),
                ("forward_index", "it tells which tensor the forward pass takes next", _FORWARD_TEST),
                ("backward_index", "it tells which tensor the recompute takes next", _RECOMPUTE_TEST),
            )
        ),
    ),
)
"""What the adapter needs."""

TopK = Callable[..., Any]


def _routers_queues(manager: Any) -> list[Any]:
    from miles.utils.replay_base import routing_replay_manager

    return list(manager.replays) if manager is routing_replay_manager else []


_asked = AskedQueues("miles", _routers_queues)


def with_native_rows(get_topk_fn: Callable[..., TopK]) -> Callable[..., TopK]:
    """Wrapper of `BaseReplayManager.get_topk_fn`: routers are given their own experts in unknown rows."""
    rows = NativeRows("miles")

    @functools.wraps(get_topk_fn)
    def wrapped(manager: Any, old_topk_fn: TopK, return_probs: bool) -> TopK:
        from miles.utils.replay_base import routing_replay_manager

        topk_fn = get_topk_fn(manager, old_topk_fn, return_probs)
        if manager is not routing_replay_manager:
            return topk_fn

        def of_known_and_native_rows(scores: Tensor, topk: int, *args: Any, **kwargs: Any) -> Any:
            queue = manager.get_current()
            if not manager.enabled or queue is None or not replays("miles", manager.stage):
                return topk_fn(scores, topk, *args, **kwargs)

            def own_topk(scores: Tensor) -> Tensor:
                chosen = old_topk_fn(scores, topk, *args, **kwargs)
                return chosen[1] if return_probs else chosen

            _asked.note(queue)
            manager.set_current(rows.filled(queue, manager.stage, scores, topk, own_topk))
            try:
                return topk_fn(scores, topk, *args, **kwargs)
            finally:
                manager.set_current(queue)

        return of_known_and_native_rows

    return wrapped


PATCHES = (
    Patch(LEDGER, f"{_MANAGER}.get_topk_fn", with_native_rows),
    Patch(LEDGER, f"{_MANAGER}.clear_all", _asked.around_clear_all),
)
"""What `init` applies."""


def init(args: Any) -> None:
    """What miles calls in each process of its trainer, once its process groups are there.

    Args:
        args: miles' own arguments.

    Raises:
        SeamError: the installed miles does not fit the ledger, or lacks an argument that is looked at.
        UnsupportedError: an argument under which replay would be passed by, or wrong.
    """
    if asked := bool(getattr(args, "use_rollout_routing_replay", False)):
        refuse_settings("miles", args)
    for patch in PATCHES:
        patch.apply()
    say_at_start(STACKS["miles"], asked=asked)
