"""The mismatch between rollout engine and trainer: see it, measure it, correct for it.

Plain torch, no engine: log-probabilities in, figures, weights, masks, advantages and losses out.

    responses = Responses.padded(response_mask, group_ids)      # or Responses.packed(mask, cu_seqlens, group_ids)
    ratios = LogRatios.of(trainer=old_logprobs, rollout=rollout_logprobs, responses=responses)
    logger.log(diagnose(ratios).flat())
    weights = truncated_importance_weights(ratios) * catastrophic_token_veto(ratios)
    loss, metrics = grpo_loss(
        current=logprobs, old=old_logprobs, advantages=advantages, responses=responses, weights=weights
    )
    metrics.require()  # before the optimizer's step
"""

from router_replay.mismatch.advantages import (
    DoublyRobust,
    doubly_robust_advantages,
    group_relative_advantages,
    optimal_token_baseline_advantages,
)
from router_replay.mismatch.corrections.metropolis import MetropolisChain, metropolis_chain
from router_replay.mismatch.corrections.pointwise import masked_weight, truncated_weight
from router_replay.mismatch.corrections.rejection import (
    catastrophic_token_veto,
    exact_trust_region_mask,
    off_policy_sequence_mask,
    trust_region_mask,
)
from router_replay.mismatch.corrections.self_normalized import self_normalized_weights
from router_replay.mismatch.corrections.truncated_sampling import apply_sampling_mask, kept_token_ids
from router_replay.mismatch.corrections.weights import (
    balance_heuristic_weights,
    icepop_weights,
    masked_importance_weights,
    truncated_importance_weights,
)
from router_replay.mismatch.figures.diagnostics import Diagnostics, diagnose
from router_replay.mismatch.figures.tally import Tally
from router_replay.mismatch.filters import FilteredResponses, filter_responses
from router_replay.mismatch.log_ratios import LogRatios, log_ratio
from router_replay.mismatch.loss_metrics import LossMetrics
from router_replay.mismatch.losses import aggregate, decoupled_loss, grpo_loss, gspo_loss
from router_replay.mismatch.responses import Responses
from router_replay.mismatch.sampler_top_k import SamplerTopK
from router_replay.mismatch.score_centering import score_centering_loss
from router_replay.mismatch.vocabulary import logprobs_at

__all__ = [
    "Diagnostics",
    "DoublyRobust",
    "FilteredResponses",
    "LogRatios",
    "LossMetrics",
    "MetropolisChain",
    "Responses",
    "SamplerTopK",
    "Tally",
    "aggregate",
    "apply_sampling_mask",
    "balance_heuristic_weights",
    "catastrophic_token_veto",
    "decoupled_loss",
    "diagnose",
    "doubly_robust_advantages",
    "exact_trust_region_mask",
    "filter_responses",
    "group_relative_advantages",
    "grpo_loss",
    "gspo_loss",
    "icepop_weights",
    "kept_token_ids",
    "log_ratio",
    "logprobs_at",
    "masked_importance_weights",
    "masked_weight",
    "metropolis_chain",
    "off_policy_sequence_mask",
    "optimal_token_baseline_advantages",
    "score_centering_loss",
    "self_normalized_weights",
    "truncated_importance_weights",
    "truncated_weight",
    "trust_region_mask",
]
