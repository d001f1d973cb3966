"""The gates of each family of models at given experts, by the family's own formula, operation by operation.

Each takes a router, its logits `[n, E]` and experts `int64 [n, K]`, and gives the gates `[n, K]` in the dtype in which
the router gives them. What a router computes beside its logits, which are learned, is only this and its choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gates = Callable[[Any, Tensor, Tensor], Tensor]


def softmax_gates(router: Any, logits: Tensor, experts: Tensor) -> Tensor:
    """Probabilities over all experts, divided by their sum at the chosen ones where `norm_topk_prob` is set."""
    gates = _probabilities(logits, experts)
    if router.norm_topk_prob:
        gates = gates / gates.sum(dim=-1, keepdim=True)
    return gates.to(logits.dtype)


def normalized_softmax_gates(router: Any, logits: Tensor, experts: Tensor) -> Tensor:
    """Probabilities over all experts, divided by their sum at the chosen ones."""
    return float32_softmax_gates(router, logits, experts).to(logits.dtype)


def float32_softmax_gates(router: Any, logits: Tensor, experts: Tensor) -> Tensor:
    """Probabilities over all experts, divided by their sum at the chosen ones, in float32 in any model."""
    gates = _probabilities(logits, experts)
    return gates / gates.sum(dim=-1, keepdim=True)


def softmax_of_chosen_gates(router: Any, logits: Tensor, experts: Tensor) -> Tensor:
    """Softmax over the logits of the chosen experts, in the model's dtype."""
    return torch.nn.functional.softmax(logits.gather(1, experts), dim=1, dtype=logits.dtype)


def sigmoid_gates(router: Any, logits: Tensor, experts: Tensor) -> Tensor:
    """Sigmoid scores, without the bias that corrects the choice; divided by their sum, and scaled."""
    gates = logits.sigmoid().gather(1, experts)
    if router.norm_topk_prob:
        gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)
    return gates * router.routed_scaling_factor


def _probabilities(logits: Tensor, experts: Tensor) -> Tensor:
    return torch.nn.functional.softmax(logits, dtype=torch.float, dim=-1).gather(1, experts)
