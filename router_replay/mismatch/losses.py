"""Losses of a policy on tokens that another policy sampled: to be minimised, scalar, differentiable, with metrics.

Three policies: `rollout` (mu, the engine), `old` or `proximal` (the trainer before the update, or a moving average of
it, from which trust is measured) and `current` (pi_theta, the only one that gradients flow to).

No loss waits for the device. What `LogRatios.of` would refuse (`old` in the rollout's place) makes the loss and its
gradient NaN, and `LossMetrics.require`, which belongs before the optimizer's step, an error on all ranks.

Under context parallelism (`Responses` with a `context_group`) every rank has the loss and the metrics of the whole
sequences, and the gradient with respect to its own tokens: gradients of parameters add up over the group.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.arguments import require_tensors
from router_replay.mismatch.corrections.weights import truncated_importance_weights
from router_replay.mismatch.faults import Faults, faults_of
from router_replay.mismatch.log_ratios import (
    LogRatios,
    difference,
    require_log_ratios,
    saturating_exp,
)
from router_replay.mismatch.loss_metrics import LossMetrics
from router_replay.mismatch.responses import Responses, require_responses

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
            A tensor is not looked at: one that is not above 0 makes the loss NaN.

    Raises:
        InputError: another shape, aggregation, or a denominator that is not above 0.
    """
    require_responses(responses)
    responses.require(losses=losses)
    if aggregation == "token-mean":
        return _over(responses.sum(losses).sum(), responses.lengths.sum(), denominator)
    if aggregation == "sequence-mean":
        return _over(responses.mean(losses).sum(), (responses.lengths > 0).sum(), denominator)
    raise InputError(f"aggregation must be 'token-mean' or 'sequence-mean', got {aggregation!r}")


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
        The loss, a scalar with a gradient to `current` alone, and what became of its tokens. A token that cannot be
        used makes both NaN: `metrics.require(data_parallel_group)`, before the optimizer's step, raises on all ranks.

    Raises:
        InputError: shapes that differ, a clip range that does not hold 1, or what `aggregate` refuses.
    """
    require_clip_range(clip_low, clip_high)
    faults = faults_of(current, old, responses, ("current", "old")).of_whole(responses)
    log_ratio = _loud(difference(current, old.detach(), responses), faults)
    if responses.is_per_sequence(advantages=advantages):
        advantages = responses.expand(advantages)
    ratio = saturating_exp(log_ratio)
    losses = _weighted(_clipped(ratio, advantages, clip_low, clip_high), weights, responses)
    loss = aggregate(losses, responses, aggregation, denominator)
    metrics = LossMetrics.of(
        counted=responses.mask,
        ratio=ratio,
        advantages=advantages,
        clip=(clip_low, clip_high),
        weights=weights,
        log_ratio=log_ratio,
        mask=responses.mask,
        refused=faults.tokens,
    )
    return loss, _of_whole(metrics, responses)


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
    geometric mean of the token ratios, not their product, so that bounds do not depend on length. It is over the tokens
    of `responses`: where `Responses.keep` took some of a response out, it is not the ratio of that response.

    Args:
        current, old: log-probabilities, tokens' shape.
        advantages: `[S]`.
        weights: at least 0, tokens' shape; they are detached, and a sequence's weight is the mean over its tokens: a
            mask of tokens leaves the ratio, and weighs the sequence by the share that it keeps.
        denominator: number of sequences with response tokens in the global batch, see `aggregate`.

    Returns:
        The loss, a scalar with a gradient to `current` alone, and what became of its sequences. A token that cannot be
        used makes both NaN, see `grpo_loss`.

    Raises:
        InputError: as of `grpo_loss`; advantages of another shape.
    """
    require_clip_range(clip_low, clip_high)
    faults = faults_of(current, old, responses, ("current", "old")).of_whole(responses)
    require_tensors(advantages=advantages)
    if advantages.shape != (responses.num_sequences,):
        raise InputError(
            f"GSPO has one advantage for each sequence: advantages {list(advantages.shape)} must be"
            f" [{responses.num_sequences}]"
        )
    log_ratio = _loud(difference(current, old.detach(), responses), faults)
    ratio, there = saturating_exp(responses.mean(log_ratio)), responses.lengths > 0
    losses = _clipped(ratio, advantages.masked_fill(~there, 0), clip_low, clip_high).masked_fill(~there, 0)
    if weights is not None:
        responses.require(weights=weights)
        weights = responses.mean(weights.detach().to(ratio.dtype))
        losses = losses * weights
    metrics = LossMetrics.of(
        counted=responses.counted,
        ratio=ratio,
        advantages=advantages,
        clip=(clip_low, clip_high),
        weights=weights,
        log_ratio=log_ratio,
        mask=responses.mask,
        refused=faults.tokens,
    )
    return _over(losses.sum(), there.sum(), denominator), _of_whole(metrics, responses)


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
        the truncated pi_prox / mu times `weights`, and KL is that of the proximal and the current policy. A token that
        cannot be used, or has probability 0 under the proximal policy, makes both NaN, see `grpo_loss`.

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


def require_clip_range(clip_low: float, clip_high: float) -> None:
    """Raise InputError unless ratios from 1 - low to 1 + high hold 1, and are not negative."""
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise InputError(f"a clip range needs 0 <= low <= 1 and 0 <= high, got {clip_low} and {clip_high}")


def _over(total: Tensor, count: Tensor, denominator: float | Tensor | None) -> Tensor:
    if denominator is None:
        # A batch whose every token was dropped has loss 0 and a gradient of zeros.
        return total / count.clamp(min=1)
    if isinstance(denominator, Tensor):
        return total / denominator.where(denominator > 0, torch.nan)
    if not denominator > 0:
        raise InputError(f"a loss's denominator must be above 0, got {denominator}")
    return total / denominator


def _loud(log_ratio: Tensor, faults: Faults) -> Tensor:
    """NaN for every token if one has a fault, and gradients, too: what is left would look like a loss."""
    return log_ratio * torch.where(faults.found, torch.nan, 1.0)


def _of_whole(metrics: LossMetrics, responses: Responses) -> LossMetrics:
    """Those of whole sequences, of which every context-parallel rank counted a part."""
    return metrics if responses.context_group is None else metrics.all_reduce(responses.context_group)


def _clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    advantages = advantages.detach().to(ratio.dtype)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def _weighted(losses: Tensor, weights: Tensor | None, responses: Responses) -> Tensor:
    if weights is None:
        return losses
    responses.require(weights=weights)
    return losses * weights.detach().to(losses.dtype)
