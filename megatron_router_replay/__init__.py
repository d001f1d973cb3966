"""Make Megatron-Core take the experts that the rollout engine took, with gates from the trainer's own logits.

    replay = attach(model)
    with replay.microbatch(masks, BatchLayout.padded(token_ids, lengths)):
        output = model(...)
    replay.remove()

Needs Megatron-Core and nothing of the rollout engine; masks arrive as `router_replay.masks.RoutingMasks`.
"""

import importlib.util

from megatron_router_replay.ledger import LEDGER
from router_replay.errors import SeamError
from router_replay.replay import BatchLayout, MicrobatchRoutes, ObservedRoutes
from router_replay.upstream import require

try:
    from megatron_router_replay.attach import Replay, attach
except ImportError as error:
    # Of a release that lacks a name, the ledger knows what that was for.
    if (error.name or "").startswith("megatron.core.") and importlib.util.find_spec("megatron") is not None:
        require(LEDGER)
    raise SeamError(
        f"megatron_router_replay needs Megatron-Core, and importing it failed ({error}): install it beside this package"
        ' with pip install "rollout-routing-replay[megatron]"'
    ) from error

__all__ = ["BatchLayout", "MicrobatchRoutes", "ObservedRoutes", "Replay", "attach"]
