"""Replay without a trainer's name: the places of a microbatch, its packed rows, and what is bound to a forward pass."""

from router_replay.replay.gate import FreshWeights
from router_replay.replay.layout import BatchLayout
from router_replay.replay.microbatch import MicrobatchRoutes
from router_replay.replay.observe import ObservedRoutes
from router_replay.replay.placement import place
from router_replay.replay.record import RecordedPart, RouteRecorder, join_parts
from router_replay.replay.shards import Shards

__all__ = [
    "BatchLayout",
    "FreshWeights",
    "MicrobatchRoutes",
    "ObservedRoutes",
    "RecordedPart",
    "RouteRecorder",
    "Shards",
    "join_parts",
    "place",
]
