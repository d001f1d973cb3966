"""Losses of a policy on tokens that another policy sampled: to be minimised, scalar, differentiable, with metrics.

Three policies: `rollout` (mu, the engine), `old` or `proximal` (the trainer before the update, or a moving average of
it, from which trust is measured) and `current` (pi_theta, the only one that gradients flow to).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.corrections.weights import truncated_importance_weights
from router_replay.mismatch.log_ratios import (
    LogRatios,
    difference,
    require_log_probabilities,
    require_log_ratios,
    saturating_exp,
)
from router_replay.mismatch.loss_metrics import LossMetrics
from router_replay.mismatch.responses import Responses, require_responses, require_tensors

Aggregation = Literal["token-mean", "sequence-mean"]


def aggregate(
    losses: Tensor,
    responses: Responses,
    aggregation: Aggregation = "token-mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """One loss of a batch from one of each token.

    token-mean: sum over all response tokens / their number (DAPO, arXiv 2503.14476: long responses count more).
    sequence-mean: mean over sequences of the mean over their tokens (GRPO, arXiv 2402.03300: every response counts the
    same). Responses without a token count in neither.

    Args:
        losses: tokens' shape.
        denominator: number of response tokens (or of sequences that have any) in the *global* batch; by default this
            batch's. Pass it where micro-batches or data-parallel ranks are summed: a mean of means is another loss.

    Raises:
        InputError: another shape, aggregation, or a denominator that is not above 0.
    """
    require_responses(responses)
    responses.require(losses=losses)
    if aggregation == "token-mean":
        total, count = responses.sum(losses).sum(), responses.mask.sum()
    elif aggregation == "sequence-mean":
        total, count = responses.mean(losses).sum(), (responses.lengths > 0).sum()
    else:
        raise InputError(f"aggregation must be 'token-mean' or 'sequence-mean', got {aggregation!r}")
    if denominator is None:
        # A batch whose every token was dropped has loss 0 and a gradient of zeros.
        return total / count.clamp(min=1)
    if not float(denominator) > 0:
        raise InputError(f"a loss's denominator must be above 0, got {denominator}")
    return total / denominator


def grpo_loss(
    *,
    current: Tensor,
    old: Tensor,
    advantages: Tensor,
    responses: Responses,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    weights: Tensor | None = None,
    aggregation: Aggregation = "sequence-mean",
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, LossMetrics]:
    """GRPO: L = - mean_t w_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t), r_t = pi_theta / pi_old.

    Source: DeepSeekMath (arXiv 2402.03300), eq. 3, without its KL penalty; another `clip_high` is clip-higher of DAPO
    (arXiv 2503.14476, 0.28). With `weights` = TIS of pi_old / mu it is the corrected objective of Yao et al. (2025):
    the weight multiplies the *clipped* term. There is no dual clip (arXiv 1912.09729).

    Args:
        current: log-probabilities under pi_theta, tokens' shape, with gradient.
        old: the same under pi_old; the rollout's own for the variant without a second trainer pass.
        advantages: tokens' shape, or `[S]`.
        weights: importance weights or masks, at least 0, tokens' shape; they are detached.
        aggregation, denominator: see `aggregate`.

    Returns:
        The loss, a scalar with a gradient to `current` alone, and what became of its tokens.

    Raises:
        InputError: shapes that differ, a clip range that does not hold 1, log-probabilities that `LogRatios.of` would
            refuse (`old` in the rollout's place), or what `aggregate` refuses.
    """
    _require_range(clip_low, clip_high)
    require_log_probabilities(current, old, responses, ("current", "old"))
    log_ratio = difference(current, old.detach(), responses)
    if responses.is_per_sequence(advantages=advantages):
        advantages = responses.expand(advantages)
    ratio = saturating_exp(log_ratio)
    losses = _weighted(_clipped(ratio, advantages, clip_low, clip_high), weights, responses)
    loss = aggregate(losses, responses, aggregation, denominator)
    return loss, LossMetrics.of(
        counted=responses.mask,
        ratio=ratio,
        advantages=advantages,
        clip=(clip_low, clip_high),
        weights=weights,
        log_ratio=log_ratio,
        mask=responses.mask,
    )


def gspo_loss(
    *,
    current: Tensor,
    old: Tensor,
    advantages: Tensor,
    responses: Responses,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, LossMetrics]:
    """GSPO: L = - mean_i w_i min(s_i A_i, clip(s_i) A_i), s_i = exp(mean_t log(pi_theta / pi_old)).

    Source: "Group sequence policy optimization" (arXiv 2507.18071), eq. 5-7, bounds of section 5.1. s_i is the
    geometric mean of the token ratios, not their product, so that bounds do not depend on length.

    Args:
        current, old: log-probabilities, tokens' shape.
        advantages: `[S]`.
        weights: at least 0, tokens' shape; they are detached, and a sequence's weight is the mean over its tokens.
        denominator: number of sequences with response tokens in the global batch, see `aggregate`.

    Returns:
        The loss, a scalar with a gradient to `current` alone, and what became of its sequences.

    Raises:
        InputError: as of `grpo_loss`; advantages of another shape.
    """
    _require_range(clip_low, clip_high)
    require_log_probabilities(current, old, responses, ("current", "old"))
    require_tensors(advantages=advantages)
    if advantages.shape != (responses.num_sequences,):
        raise InputError(
            f"GSPO has one advantage for each sequence: advantages {list(advantages.shape)} must be"
            f" [{responses.num_sequences}]"
        )
    log_ratio = difference(current, old.detach(), responses)
    ratio = saturating_exp(responses.mean(log_ratio))
    losses = responses.expand(_clipped(ratio, advantages, clip_low, clip_high))
    loss = aggregate(_weighted(losses, weights, responses), responses, "sequence-mean", denominator)
    return loss, LossMetrics.of(
        counted=responses.lengths > 0,
        ratio=ratio,
        advantages=advantages,
        clip=(clip_low, clip_high),
        weights=None if weights is None else responses.mean(weights.detach().to(ratio.dtype)),
        log_ratio=log_ratio,
        mask=responses.mask,
    )


def decoupled_loss(
    ratios: LogRatios,
    *,
    current: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    cap: float = 2.0,
    weights: Tensor | None = None,
    aggregation: Aggregation = "sequence-mean",
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, LossMetrics]:
    """Decoupled PPO: L = - mean_t min(pi_prox / mu, cap) min(r_t A_t, clip(r_t) A_t), r_t = pi_theta / pi_prox.

    The policy that samples and the one from which the trust region is measured are two: staleness and engine mismatch
    are corrected by the first factor, the size of the step is bounded by the second. Source: Hilton, Cobbe and
    Schulman, "Batch size-invariance for policy optimization" (arXiv 2110.00641); for LLMs AReaL (arXiv
    2505.24298). With pi_prox the exponential moving average of the trainer's weights it is PPO-EWMA:
    compute the proximal log-probabilities inside `ExponentialMovingAverage.swapped_in`.

    Args:
        ratios: of the proximal policy over the rollout: `LogRatios.of(trainer=proximal, ...)`.
        current: log-probabilities under pi_theta, tokens' shape, with gradient.
        advantages: tokens' shape, or `[S]`.
        cap: of pi_prox / mu, which is truncated there; `math.inf` for the paper's objective.
        weights: further weights or masks, at least 0, tokens' shape; they are detached.
        aggregation, denominator: see `aggregate`.

    Returns:
        The loss, a scalar with a gradient to `current` alone, and what became of its tokens: weights as applied are
        the truncated pi_prox / mu times `weights`, and KL is that of the proximal and the current policy.

    Raises:
        InputError: as of `grpo_loss`; a cap that is not above 0.
    """
    require_log_ratios(ratios)
    behaviour = truncated_importance_weights(ratios, cap=cap)
    return grpo_loss(
        current=current,
        old=ratios.trainer,
        advantages=advantages,
        responses=ratios.responses,
        clip_low=clip_low,
        clip_high=clip_high,
        weights=_weighted(behaviour, weights, ratios.responses),
        aggregation=aggregation,
        denominator=denominator,
    )


def _require_range(clip_low: float, clip_high: float) -> None:
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise InputError(f"a clip range needs 0 <= low <= 1 and 0 <= high, got {clip_low} and {clip_high}")


def _clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    advantages = advantages.detach().to(ratio.dtype)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def _weighted(losses: Tensor, weights: Tensor | None, responses: Responses) -> Tensor:
    if weights is None:
        return losses
    responses.require(weights=weights)
    return losses * weights.detach().to(losses.dtype)
