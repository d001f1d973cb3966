"""What rollout and trainer exchange: the routes of each token, packed, checked and tied to their tokens."""

from routing_masks.answer import masks_from_meta_info
from routing_masks.codec import CODEC_NAMES, NO_ROW, Codec, choose_codec, get_codec
from routing_masks.container import from_bytes, to_bytes
from routing_masks.digest import token_digest
from routing_masks.errors import (
    ContainerError,
    GeometryError,
    GeometryMismatchError,
    MaskValueError,
    RoutingMaskError,
    TokenMismatchError,
)
from routing_masks.geometry import RoutingGeometry
from routing_masks.masks import RoutingMasks
from routing_masks.stores import load

__all__ = [
    "CODEC_NAMES",
    "NO_ROW",
    "Codec",
    "ContainerError",
    "GeometryError",
    "GeometryMismatchError",
    "MaskValueError",
    "RoutingGeometry",
    "RoutingMaskError",
    "RoutingMasks",
    "TokenMismatchError",
    "choose_codec",
    "from_bytes",
    "get_codec",
    "load",
    "masks_from_meta_info",
    "to_bytes",
    "token_digest",
]
