"""Make models of Hugging Face's transformers take the experts that the rollout engine took.

    replay = attach(model)
    with replay.microbatch(masks, BatchLayout.padded(token_ids, lengths)):
        output = model(input_ids=token_ids, attention_mask=attention_mask)
    replay.check()  # before optimizer.step()
    replay.remove()

Gates come from the trainer's own logits. Needs transformers >= 5 and nothing of the rollout engine; masks arrive as
`router_replay.masks.RoutingMasks`.
"""

import importlib.util

from hf_router_replay.ledger import LEDGER
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
    from hf_router_replay.attach import attach
    from hf_router_replay.replay import Replay
except ImportError as error:
    # Of a release that lacks a name, the ledger knows what that was for.
    if (error.name or "").startswith("transformers.") and importlib.util.find_spec("transformers") is not None:
        require(LEDGER)
    raise SeamError(
        f"hf_router_replay needs transformers, and importing it failed ({error}): install it beside this package"
        ' with pip install "rollout-routing-replay[hf]"'
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
