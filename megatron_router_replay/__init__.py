"""Make Megatron-Core take the experts that the rollout engine took, with gates from the trainer's own logits.

    replay = attach(model_chunks)
    with replay.microbatch(masks, BatchLayout.padded(token_ids, lengths)):  # in forward_step
        output = model(...)
    replay.check()  # before optimizer.step()
    replay.remove()

Needs Megatron-Core and nothing of the rollout engine; masks arrive as `router_replay.masks.RoutingMasks`.
"""

import importlib.util

from megatron_router_replay.ledger import LEDGER
from router_replay.errors import SeamError
from router_replay.replay import (
    BatchLayout,
    FreshWeights,
    MicrobatchRoutes,
    ObservedRoutes,
    RecordedPart,
    RouteRecorder,
    Shards,
    join_parts,
)
from router_replay.upstream import require

try:
    from megatron_router_replay.attach import attach
    from megatron_router_replay.replay import Replay
except ImportError as error:
    # Of a release that lacks a name, the ledger knows what that was for.
    if (error.name or "").startswith("megatron.core.") and importlib.util.find_spec("megatron") is not None:
        require(LEDGER)
    raise SeamError(
        f"megatron_router_replay needs Megatron-Core, and importing it failed ({error}): install it beside this package"
        ' with pip install "rollout-routing-replay[megatron]"'
    ) from error

__all__ = [
    "BatchLayout",
    "FreshWeights",
    "MicrobatchRoutes",
    "ObservedRoutes",
    "RecordedPart",
    "Replay",
    "RouteRecorder",
    "Shards",
    "attach",
    "join_parts",
]
