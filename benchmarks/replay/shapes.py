"""Router shapes of released models."""

from __future__ import annotations

from typing import Any

# As fields of Megatron's TransformerConfig.
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {"num_moe_experts": 128, "moe_router_topk": 8},
    "DeepSeek-V3": {
        "num_moe_experts": 256,
        "moe_router_topk": 8,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 8,
        "moe_router_group_topk": 4,
        "moe_router_topk_scaling_factor": 2.5,
    },
}
