"""What rollout and trainer exchange: the routes of each token, packed, checked and tied to their tokens."""

from router_replay.masks.agreement import RouteAgreement, RouteTally, compare_routes
from router_replay.masks.batch import RoutingMasksBatch
from router_replay.masks.client import masks_from_meta_info
from router_replay.masks.codecs.row_codec import CODEC_NAMES, NO_ROW, Codec, choose_codec, get_codec
from router_replay.masks.container import from_bytes, load_file, save_file, to_bytes
from router_replay.masks.digest import token_digest
from router_replay.masks.foreign import masks_from_sglang, masks_from_vllm
from router_replay.masks.geometry import RoutingGeometry
from router_replay.masks.masks import RoutingMasks
from router_replay.masks.rollout import Rollout, Turn
from router_replay.masks.stores import Stat, Store, load, open_store

__all__ = [
    "CODEC_NAMES",
    "NO_ROW",
    "Codec",
    "Rollout",
    "RouteAgreement",
    "RouteTally",
    "RoutingGeometry",
    "RoutingMasks",
    "RoutingMasksBatch",
    "Stat",
    "Store",
    "Turn",
    "choose_codec",
    "compare_routes",
    "from_bytes",
    "get_codec",
    "load",
    "load_file",
    "masks_from_meta_info",
    "masks_from_sglang",
    "masks_from_vllm",
    "open_store",
    "save_file",
    "to_bytes",
    "token_digest",
]
