"""Metrics of the mismatch between rollout engine and trainer."""

from megatron_router_replay.mismatch.divergence import Divergence, divergence
from megatron_router_replay.mismatch.routes import RouteAgreement, compare_routes

__all__ = ["Divergence", "RouteAgreement", "compare_routes", "divergence"]
