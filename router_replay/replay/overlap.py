"""How much of the replayed routes the trainer would have chosen itself, and when that is too little to be right."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from router_replay.masks import RoutingGeometry

MIN_PLACES = 16
"""Fewer places than this say nothing about a whole microbatch."""


def hardly_any(geometry: RoutingGeometry) -> float:
    """Share of a place's experts below which the trainer's choice and the replayed one have hardly any in common.

    Two unrelated choices of K of E experts share K / E of them on average (the hypergeometric mean), the same choice
    shares all. The threshold is a quarter of the way from the one to the other: what a token shares with another token
    is little above chance, since routers like some experts more than others, and what two engines choose for the same
    token was found to differ in about one route of ten (arXiv 2510.11370).
    """
    chance = geometry.top_k / geometry.num_experts
    return chance + (1 - chance) / 4


@dataclass(eq=False)
class OverlapSample:
    """Experts that both choices share, at some places of one forward pass.

    Attributes:
        by_layer: for each decoder layer that was compared, the number of shared experts of each sampled place,
            `int64 [n]` on the device.
    """

    by_layer: dict[int, Tensor] = field(default_factory=dict)

    def compare(self, layer: int, own: Tensor, replayed: Tensor) -> None:
        """Count what two choices `int [n, K]` of one layer share; neither has an expert twice."""
        self.by_layer[layer] = (own[:, :, None] == replayed[:, None, :]).sum((1, 2))

    def num_with_hardly_any(self, geometry: RoutingGeometry) -> Tensor:
        """How many places share hardly any expert over all layers compared, an `int64` scalar on the device."""
        shared = torch.stack(list(self.by_layer.values())).sum(0)
        return (shared < hardly_any(geometry) * geometry.top_k * len(self.by_layer)).sum()
