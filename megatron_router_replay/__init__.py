"""Make Megatron-Core take the experts that the rollout engine took, with gates from the trainer's own logits.

    replay = attach(model)
    with replay.microbatch(masks, BatchLayout.padded(token_ids, lengths)):
        output = model(...)
    replay.remove()

Needs Megatron-Core and nothing of the rollout engine; masks arrive as ``routing_masks.RoutingMasks``.
"""

from megatron_router_replay.attach import Replay, attach
from megatron_router_replay.errors import (
    AlreadyAttachedError,
    DetachedRecomputeError,
    DuplicateLayerError,
    LayoutError,
    MasksPlacementError,
    NoRouterError,
    ObservationError,
    ReplayError,
    RowCountError,
    SeamError,
    UnboundForwardError,
    UnsupportedConfigError,
)
from megatron_router_replay.layout import BatchLayout
from megatron_router_replay.microbatch import MicrobatchRoutes
from megatron_router_replay.observe import ObservedRoutes

__all__ = [
    "AlreadyAttachedError",
    "BatchLayout",
    "DetachedRecomputeError",
    "DuplicateLayerError",
    "LayoutError",
    "MasksPlacementError",
    "MicrobatchRoutes",
    "NoRouterError",
    "ObservationError",
    "ObservedRoutes",
    "Replay",
    "ReplayError",
    "RowCountError",
    "SeamError",
    "UnboundForwardError",
    "UnsupportedConfigError",
    "attach",
]
