"""Geometries of released mixture-of-experts models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router_replay.masks import RoutingGeometry

# name: (MoE layers, top-k, experts), the dense layers of the released models left out.
MODELS = {
    "Qwen3-30B-A3B": (48, 8, 128),
    "Qwen3-235B-A22B": (94, 8, 128),
    "DeepSeek-V3": (58, 8, 256),
    "Kimi-K2": (60, 8, 384),
    "gpt-oss-120b": (36, 4, 128),
    "Mixtral-8x7B": (32, 2, 8),
    "Qwen3-Next-80B": (48, 10, 512),
    "OLMoE-1B-7B": (16, 8, 64),
}

# Those of them whose first layers are dense, and how many: SGLang's own capture sends these layers as well, as zeros.
DENSE_LAYERS = {"DeepSeek-V3": 3, "Kimi-K2": 1}


def geometry_of(name: str) -> RoutingGeometry:
    """Geometry with the model's routed layers only."""
    # Here and not above: a program's --help lists the models without waiting for torch.
    from router_replay.masks import RoutingGeometry

    layers, top_k, num_experts = MODELS[name]
    return RoutingGeometry(layers, tuple(range(layers)), num_experts, top_k)
