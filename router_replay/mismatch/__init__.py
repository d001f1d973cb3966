"""The mismatch between rollout engine and trainer: see it, measure it, correct for it.

Plain torch, no engine: log-probabilities in, figures, weights, masks, advantages and losses out.

    responses = Responses.padded(response_mask, group_ids)      # or Responses.packed(mask, cu_seqlens, group_ids)
    print(diagnose(old_logprobs, rollout_logprobs, responses))
    weights = truncated_importance_weights(old_logprobs, rollout_logprobs, responses)
    keep = catastrophic_token_veto(old_logprobs, rollout_logprobs, responses)
    loss = grpo_loss(logprobs, old_logprobs, advantages, responses, weights=weights * keep)
"""

from router_replay.mismatch.advantages import (
    DoublyRobust,
    doubly_robust_advantages,
    group_relative_advantages,
    optimal_token_baseline_advantages,
)
from router_replay.mismatch.corrections.metropolis import MetropolisChain, metropolis_chain
from router_replay.mismatch.corrections.rejection import (
    catastrophic_token_veto,
    exact_trust_region_mask,
    off_policy_sequence_mask,
    trust_region_mask,
)
from router_replay.mismatch.corrections.self_normalized import self_normalized_weights
from router_replay.mismatch.corrections.truncated_sampling import apply_sampling_mask, sampling_mask
from router_replay.mismatch.corrections.weights import (
    balance_heuristic_weights,
    icepop_weights,
    masked_importance_weights,
    truncated_importance_weights,
)
from router_replay.mismatch.figures.diagnostics import Diagnostics, diagnose
from router_replay.mismatch.figures.tally import Tally
from router_replay.mismatch.log_ratios import log_ratio
from router_replay.mismatch.losses import aggregate, decoupled_loss, grpo_loss, gspo_loss
from router_replay.mismatch.responses import Responses

__all__ = [
    "Diagnostics",
    "DoublyRobust",
    "MetropolisChain",
    "Responses",
    "Tally",
    "aggregate",
    "apply_sampling_mask",
    "balance_heuristic_weights",
    "catastrophic_token_veto",
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
