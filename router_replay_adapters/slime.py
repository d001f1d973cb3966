"""Rows that are unknown take the router's own experts in slime, which fails in a gather there.

    --custom-megatron-init-path router_replay_adapters.slime.init

slime imports it in every process of its Megatron trainer. Its decoding, slicing and queues stay.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from router_replay.upstream import Attribute, Ledger, Patch, Seam
from router_replay_adapters.asked_queues import AskedQueues
from router_replay_adapters.native_rows import NativeRows, replays
from router_replay_adapters.refusals import refuse_settings
from router_replay_adapters.stacks import STACKS, say_at_start

_OWN = "slime gives rows that are unknown to the router"
_TESTS = "tests/router_replay_adapters/test_unknown_rows.py"
_FORWARD_TEST = f"{_TESTS}::test_unknown_rows_are_native_and_known_ones_replayed"
_RECOMPUTE_TEST = f"{_TESTS}::test_a_recompute_takes_the_experts_of_its_forward_pass"

LEDGER = Ledger(
    distribution="slime",
    title="slime",
    prefix="slime.utils.routing_replay.",
    subject="the adapter for slime",
    tested=(),
    checked=("0.3.1",),
    way_out="take the adapter's --custom-megatron-init-path away and let no server answer with unknown rows",
    seams=(
        Seam(
            "get_routing_replay_compute_topk",
            ("old_compute_topk",),
            "wrapped by slime.with_native_rows",
            "slime's Megatron asks it for a top-k in every call of a router",
            _OWN,
        ),
        Seam(
            "set_routing_replay",
            ("replay",),
            "called by slime.with_native_rows",
            "it sets the queue that the next experts are taken from",
            _OWN,
        ),
        Seam(
            "ROUTING_REPLAY",
            None,
            "read by slime.with_native_rows",
            "it is the queue of the router that is asked",
            _OWN,
        ),
        Seam(
            "_compute_topk_for_current_router",
            ("old_compute_topk", "scores", "topk", "*", "num_groups", "group_topk"),
            "called by slime.with_native_rows",
            "it is how a router chooses where nothing is replayed",
            _OWN,
        ),
        Seam(
            "RoutingReplay.clear_all",
            (),
            "wrapped by asked_queues.AskedQueues.around_clear_all",
            "it is called at the end of a step, whose queues it empties",
            _OWN,
        ),
        Seam(
            "RoutingReplay.all_routing_replays",
            None,
            "read by slime._routers_queues",
            "it holds the queues",
            _OWN,
        ),
        Seam(
            "RoutingReplay.pop_forward",
            (),
            "called by native_rows.NativeRows",
            "it gives the experts of the next forward pass",
            _OWN,
        ),
        Seam(
            "RoutingReplay.pop_backward",
            (),
            "called by native_rows.NativeRows",
            "it gives the experts of the next recompute",
            _OWN,
        ),
    ),
    attributes=tuple(
        Attribute("RoutingReplay", name, "read by native_rows.NativeRows.filled", why, test)
        for name, why, test in (
            ("top_indices_list", "it holds the recorded tensor that comes next", _FORWARD_TEST),
            ("forward_index", "it tells which tensor the forward pass takes next", _FORWARD_TEST),
            ("backward_index", "it tells which tensor the recompute takes next", _RECOMPUTE_TEST),
        )
    ),
)
"""What the adapter needs. slime is on no index: these are the names of its repository at 624b824."""

TopK = Callable[..., tuple[Tensor, Tensor]]


def _routers_queues() -> list[Any]:
    from slime.utils.routing_replay import RoutingReplay

    return list(RoutingReplay.all_routing_replays)


_asked = AskedQueues("slime", _routers_queues)


def with_native_rows(get_compute_topk: Callable[[TopK], TopK]) -> Callable[[TopK], TopK]:
    """Wrapper of `get_routing_replay_compute_topk`: routers are given their own experts in unknown rows."""
    rows = NativeRows("slime")

    @functools.wraps(get_compute_topk)
    def wrapped(old_compute_topk: TopK) -> TopK:
        from slime.utils import routing_replay

        compute_topk = get_compute_topk(old_compute_topk)

        def of_known_and_native_rows(
            scores: Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None
        ) -> tuple[Tensor, Tensor]:
            groups = {"num_groups": num_groups, "group_topk": group_topk}
            queue, stage = routing_replay.ROUTING_REPLAY, _stage()
            # Without a stage slime raises by itself.
            if queue is None or stage is None or not replays("slime", stage):
                return compute_topk(scores, topk, **groups)

            def own_topk(scores: Tensor) -> Tensor:
                return routing_replay._compute_topk_for_current_router(old_compute_topk, scores, topk, **groups)[1]

            _asked.note(queue)
            routing_replay.set_routing_replay(rows.filled(queue, stage, scores, topk, own_topk))
            try:
                return compute_topk(scores, topk, **groups)
            finally:
                routing_replay.set_routing_replay(queue)

        return of_known_and_native_rows

    return wrapped


def _stage() -> str | None:
    # As slime itself tells its routers.
    return os.environ.get("ROUTING_REPLAY_STAGE") if os.environ.get("ENABLE_ROUTING_REPLAY") == "1" else None


PATCHES = (
    Patch(LEDGER, "get_routing_replay_compute_topk", with_native_rows),
    Patch(LEDGER, "RoutingReplay.clear_all", _asked.around_clear_all),
)
"""What `init` applies."""


def init(args: Any) -> None:
    """What slime calls in each process of its trainer, once its process groups are there.

    Args:
        args: slime's own arguments.

    Raises:
        SeamError: the installed slime does not fit the ledger, or lacks an argument that is looked at.
        UnsupportedError: an argument under which replay would be passed by, or wrong.
    """
    if asked := bool(getattr(args, "use_rollout_routing_replay", False)):
        refuse_settings("slime", args)
    for patch in PATCHES:
        patch.apply()
    say_at_start(STACKS["slime"], asked=asked)
