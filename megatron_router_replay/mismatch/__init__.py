"""The mismatch between rollout engine and trainer: see it, measure it, correct for it.

Plain torch, no engine: log-probabilities in, figures, weights, masks, advantages and losses out; averages of a
model's parameters in place.

    responses = Responses.padded(response_mask, group_ids)      # or Responses.packed(mask, cu_seqlens, group_ids)
    print(diagnose(old_logprobs, rollout_logprobs, responses))
    weights = truncated_importance_weights(old_logprobs, rollout_logprobs, responses)
    keep = catastrophic_token_veto(old_logprobs, rollout_logprobs, responses)
    loss = grpo_loss(logprobs, old_logprobs, advantages, responses, weights=weights * keep)
"""

from megatron_router_replay.mismatch.advantages import (
    DoublyRobust,
    doubly_robust_advantages,
    group_relative_advantages,
    optimal_token_baseline_advantages,
)
from megatron_router_replay.mismatch.diagnostics import Diagnostics, diagnose
from megatron_router_replay.mismatch.ema import ExponentialMovingAverage
from megatron_router_replay.mismatch.masks import (
    catastrophic_token_veto,
    exact_trust_region_mask,
    off_policy_sequence_mask,
    trust_region_mask,
)
from megatron_router_replay.mismatch.metropolis import MetropolisChain, metropolis_chain
from megatron_router_replay.mismatch.objectives import aggregate, decoupled_loss, grpo_loss, gspo_loss
from megatron_router_replay.mismatch.ratios import log_ratio
from megatron_router_replay.mismatch.responses import Responses
from megatron_router_replay.mismatch.routes import RouteAgreement, RouteTally, compare_routes
from megatron_router_replay.mismatch.sampling_masks import apply_sampling_mask, sampling_mask
from megatron_router_replay.mismatch.self_normalized import self_normalized_weights
from megatron_router_replay.mismatch.tally import Tally
from megatron_router_replay.mismatch.weights import (
    balance_heuristic_weights,
    icepop_weights,
    masked_importance_weights,
    truncated_importance_weights,
)

__all__ = [
    "Diagnostics",
    "DoublyRobust",
    "ExponentialMovingAverage",
    "MetropolisChain",
    "Responses",
    "RouteAgreement",
    "RouteTally",
    "Tally",
    "aggregate",
    "apply_sampling_mask",
    "balance_heuristic_weights",
    "catastrophic_token_veto",
    "compare_routes",
    "decoupled_loss",
    "diagnose",
    "doubly_robust_advantages",
    "exact_trust_region_mask",
    "group_relative_advantages",
    "grpo_loss",
    "gspo_loss",
    "icepop_weights",
    "log_ratio",
    "masked_importance_weights",
    "metropolis_chain",
    "off_policy_sequence_mask",
    "optimal_token_baseline_advantages",
    "sampling_mask",
    "self_normalized_weights",
    "truncated_importance_weights",
    "trust_region_mask",
]
