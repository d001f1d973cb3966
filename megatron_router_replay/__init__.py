"""Make Megatron-Core take the experts that the rollout engine took, with gates from the trainer's own logits.

    replay = attach(model)
    with replay.microbatch(masks, BatchLayout.padded(token_ids, lengths)):
        output = model(...)
    replay.remove()

Needs Megatron-Core and nothing of the rollout engine; masks arrive as `router_replay.masks.RoutingMasks`.
"""

from megatron_router_replay.attach import Replay, attach
from router_replay.replay import BatchLayout, MicrobatchRoutes, ObservedRoutes

__all__ = ["BatchLayout", "MicrobatchRoutes", "ObservedRoutes", "Replay", "attach"]
