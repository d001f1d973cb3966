"""Make Megatron-Core take the experts that the rollout engine took, with gates from the trainer's own logits.

    replay = attach(model)
    with replay.microbatch(masks, BatchLayout.padded(token_ids, lengths)):
        output = model(...)
    replay.remove()

Needs Megatron-Core and nothing of the rollout engine; masks arrive as ``routing_masks.RoutingMasks``. The package
``megatron_router_replay.mismatch`` needs torch alone, and so do the files that ``megatron_router_replay.report`` reads.
"""

from typing import TYPE_CHECKING, Any

from megatron_router_replay.errors import (
    AlreadyAttachedError,
    AverageInUseError,
    AverageSourceError,
    AverageStateError,
    DetachedRecomputeError,
    DuplicateLayerError,
    LayoutError,
    MasksPlacementError,
    MismatchInputError,
    NoRouterError,
    ObservationError,
    ReplayError,
    RowCountError,
    RunFileError,
    SeamError,
    UnboundForwardError,
    UnsupportedConfigError,
)
from megatron_router_replay.layout import BatchLayout
from megatron_router_replay.microbatch import MicrobatchRoutes
from megatron_router_replay.observe import ObservedRoutes

if TYPE_CHECKING:
    from megatron_router_replay.replay import Replay, attach

__all__ = [
    "AlreadyAttachedError",
    "AverageInUseError",
    "AverageSourceError",
    "AverageStateError",
    "BatchLayout",
    "DetachedRecomputeError",
    "DuplicateLayerError",
    "LayoutError",
    "MasksPlacementError",
    "MicrobatchRoutes",
    "MismatchInputError",
    "NoRouterError",
    "ObservationError",
    "ObservedRoutes",
    "Replay",
    "ReplayError",
    "RowCountError",
    "RunFileError",
    "SeamError",
    "UnboundForwardError",
    "UnsupportedConfigError",
    "attach",
]


def __getattr__(name: str) -> Any:
    # Megatron-Core takes tens of seconds to import, and is not there at all where only the mismatch is looked at.
    if name in ("Replay", "attach"):
        from megatron_router_replay import replay

        return getattr(replay, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
