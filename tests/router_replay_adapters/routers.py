"""Megatron's own router, asked for its experts as the patched Megatrons of miles and slime ask for them.

Those call the stack's top-k in `topk_routing_with_score_function`, where stock Megatron-Core asks `router_replay`: a
bridge there makes the same call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from cpu_engines.megatron.config import WITHOUT_GPU

NUM_EXPERTS = 16
TOP_K = 4
HIDDEN = 32

TopK = Callable[..., tuple[Tensor, Tensor]]


class Bridge:
    """What stock Megatron-Core asks in the place of its top-k: a stack's own function."""

    def __init__(self, topk_of_stack: Callable[[TopK], TopK]) -> None:
        self._topk_of_stack = topk_of_stack

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default_compute_topk: TopK
    ) -> tuple[Tensor, Tensor]:
        return self._topk_of_stack(default_compute_topk)(scores, topk, num_groups=num_groups, group_topk=group_topk)


def router(topk_of_stack: Callable[[TopK], TopK], **overrides: Any) -> TopKRouter:
    """A router as `stock_router` makes it, whose stack has the last word.

    Args:
        topk_of_stack: what the stack makes of the router's own top-k.
        overrides: of the configuration's fields.
    """
    made = stock_router(**overrides)
    made.router_replay = Bridge(topk_of_stack)
    return made


def stock_router(**overrides: Any) -> TopKRouter:
    """A router of 16 experts, top-4, with random weights.

    Args:
        overrides: of the configuration's fields.
    """
    settings = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "num_moe_experts": NUM_EXPERTS,
        "moe_router_topk": TOP_K,
        "moe_router_load_balancing_type": "none",
        "add_bias_linear": False,
        **WITHOUT_GPU,
        **overrides,
    }
    made = TopKRouter(TransformerConfig(**settings), get_default_pg_collection())
    with torch.no_grad():
        made.weight.copy_(torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(1)))
    return made


def hidden_states(num_rows: int) -> Tensor:
    """Inputs `[num_rows, 1, HIDDEN]` of a router, of which a gradient is wanted."""
    states = torch.randn(num_rows, 1, HIDDEN, generator=torch.Generator().manual_seed(2))
    return states.requires_grad_()


def experts_of(routing_map: Tensor) -> list[set[int]]:
    """Experts of each row of a routing map `bool [rows, E]`."""
    return [set(row.nonzero().flatten().tolist()) for row in routing_map]


def own_topk(made: TopKRouter, states: Tensor) -> Tensor:
    """Experts `int64 [rows, K]` that a router chooses by itself for inputs `[rows, 1, HIDDEN]`, best first."""
    logits = states.detach().double().flatten(0, 1) @ made.weight.detach().double().T
    return logits.topk(TOP_K).indices


def own_experts(made: TopKRouter, states: Tensor) -> list[set[int]]:
    """The same as sets."""
    return [set(row) for row in own_topk(made, states).tolist()]


def gradients_of(made: TopKRouter, states: Tensor) -> tuple[Tensor, ...]:
    """Gates of a pass, and the gradients of the router's weights and inputs in a loss of these gates."""
    probs, _ = made(states)
    (probs * torch.arange(NUM_EXPERTS)).square().sum().backward()
    return probs.detach(), made.weight.grad, states.grad


def expected_experts(own: list[set[int]]) -> list[set[int]]:
    """Experts of each row of `RECORDED` in a replay that has the router's own in unknown rows."""
    recorded = RECORDED.tolist()
    return [own[row] if row in UNKNOWN else set(recorded[row]) for row in range(len(recorded))]


SCORES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax before top-k": {"moe_router_pre_softmax": True},
    "sigmoid, expert bias": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    # Its top-k takes no part of the rows, only all of them.
    "groups": {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
}
"""Settings of routers by what they choose experts by."""

RECORDED = torch.tensor(
    [[3, 9, 0, 12], [-1, -1, -1, -1], [5, 1, 15, 7], [-1, -1, -1, -1], [2, 8, 11, 4], [-1, -1, -1, -1]],
    dtype=torch.int32,
)
"""Experts of six rows, of which every other is unknown; no known one is what the router chooses by itself."""
KNOWN = (0, 2, 4)
UNKNOWN = (1, 3, 5)
