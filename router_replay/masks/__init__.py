"""What rollout and trainer exchange: the routes of each token, packed, checked and tied to their tokens."""

from router_replay.masks.agreement import RouteAgreement, RouteTally, compare_routes
from router_replay.masks.client import masks_from_meta_info
from router_replay.masks.codecs.row_codec import CODEC_NAMES, NO_ROW, Codec, choose_codec, get_codec
from router_replay.masks.container import from_bytes, to_bytes
from router_replay.masks.digest import token_digest
from router_replay.masks.geometry import RoutingGeometry
from router_replay.masks.masks import RoutingMasks
from router_replay.masks.stores import load

__all__ = [
    "CODEC_NAMES",
    "NO_ROW",
    "Codec",
    "RouteAgreement",
    "RouteTally",
    "RoutingGeometry",
    "RoutingMasks",
    "choose_codec",
    "compare_routes",
    "from_bytes",
    "get_codec",
    "load",
    "masks_from_meta_info",
    "to_bytes",
    "token_digest",
]
