"""Which tokens or sequences to leave out of the loss because the trainer and the rollout disagree on them too much.

Every function returns a detached bool tensor in the tokens' shape: True for response tokens to keep, False for the
others and for all that is no response token. Combine them with `&`; `responses.keep(mask)` also takes what is
dropped out of a loss's denominator, `weights * mask` leaves it there. After the former the loss is a mean over what is
left, after the latter a batch with many rejections takes a smaller step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.arguments import require_tensors
from router_replay.mismatch.log_ratios import LogRatios, require_log_ratios
from router_replay.mismatch.ranks import together
from router_replay.mismatch.responses import Responses, require_responses


def catastrophic_token_veto(ratios: LogRatios, *, threshold: float = 1e-4) -> Tensor:
    """Drop every sequence that has a token with pi / mu below `threshold`.

    One token that the trainer would almost never take shows that the two engines computed different things from there
    on, and the rest of the sequence hangs on it. A large ratio alone is not catastrophic: weights are capped, and small
    ones are not. Source: Liu, Li et al., "When speed kills stability" (2025, richardli.xyz/rl-collapse), token veto.

    Args:
        threshold: in (0, 1); a ratio that equals it is kept.

    Raises:
        InputError: another threshold.
    """
    require_log_ratios(ratios)
    if not 0 < threshold < 1:
        raise InputError(f"the veto's threshold is a ratio in (0, 1), got {threshold}")
    responses = ratios.responses
    return responses.expand(responses.max(-ratios.token) <= -math.log(threshold))


def off_policy_sequence_mask(ratios: LogRatios, advantages: Tensor, *, max_kl: float = 0.1) -> Tensor:
    """Off-policy sequence masking: M_it = 0 if A_it < 0 and (1/T_i) sum_t log(mu / pi_theta) > delta, else 1.

    What the model did badly while it was another model teaches nothing and destabilises; what it did well may stay.
    Source: DeepSeek-V3.2 (arXiv 2512.02556), eq. 9; mu is what the inference engine returned, so that the KL has
    staleness and engine mismatch in one. The report gives no delta; that of other projects is in docs/corrections.md.
    The mask is per token where advantages are, as in the equation; with one advantage per sequence it drops whole
    sequences.

    Args:
        ratios: of the policy that is being optimised: `LogRatios.of(trainer=current, ...)`.
        advantages: tokens' shape, or `[S]`.
        max_kl: delta, nats per token.

    Raises:
        InputError: advantages of another shape.
    """
    require_log_ratios(ratios)
    responses = ratios.responses
    if responses.is_per_sequence(advantages=advantages):
        advantages = responses.expand(advantages)
    kl = responses.mean(-ratios.token)
    return responses.mask & ~((advantages.detach() < 0) & responses.expand(kl > max_kl))


def trust_region_mask(ratios: LogRatios, *, max_k2: float | None = 0.1, mean_k3: float | None = 0.01) -> Tensor:
    """Trust region masking by sampled tokens: keep a sequence if max_t k2_t and mean_t k3_t are within bounds.

    k2 = (log r)^2 / 2 sees both directions and bounds the worst token; k3 = r - 1 - log r is an unbiased estimate of
    KL(mu || pi), so that its mean estimates the sequence's mean KL. Source: Li et al., "Trust region masking for
    long-horizon LLM reinforcement learning" (arXiv 2512.23075), sample-based criteria; the bound on the surrogate's
    error holds for the exact maximum (`exact_trust_region_mask`), of which these are stand-ins. By default the worst
    token may have a ratio up to exp(sqrt(2 * 0.1)) = 1.56 in either direction.

    The paper's bounds come from a horizon; the defaults are for fresh rollouts, and drop nearly everything of stale
    ones: in the median of five policies a mean k3 of 0.006 lost nothing, one of 0.009 about a third, and one of 0.017
    all; between policies it was from nothing to all at 0.006 to 0.018. A response that is longer has more tokens that
    may be the worst (docs/corrections.md, "Measured"). Set both by the k3 of rollouts as old as yours, and log what is
    kept.

    Args:
        max_k2: bound of the largest k2, or None for no such bound.
        mean_k3: bound of the mean k3, nats per token, or None.

    Raises:
        InputError: no bound, or a negative one.
    """
    require_log_ratios(ratios)
    _require_bounds(max_k2=max_k2, mean_k3=mean_k3)
    responses, ratio = ratios.responses, ratios.token
    keep = torch.ones(responses.num_sequences, dtype=torch.bool, device=ratio.device)
    if max_k2 is not None:
        keep &= responses.max(ratio.square() / 2) <= max_k2
    if mean_k3 is not None:
        keep &= responses.mean(torch.expm1(ratio) - ratio) <= mean_k3
    return responses.expand(keep)


def exact_trust_region_mask(
    *,
    trainer_logits: Tensor,
    rollout_logits: Tensor,
    responses: Responses,
    max_kl: float | None = 0.1,
    mean_kl: float | None = 0.01,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Trust region masking by full distributions: keep a sequence if max_t and mean_t of KL(mu_t || pi_t) are bounded.

    KL(mu || pi) = sum_v mu_v (log mu_v - log pi_v), exact for every token's context. Source: arXiv 2512.23075, of
    whose bounds D_KL^tok,max, the maximum over a sequence, is the factor that masking controls; the paper's threshold
    depends on the horizon, so set it for your length of responses. It waits for the device, to leave out the
    distributions of what is no response token, and to check the others.

    Args:
        trainer_logits, rollout_logits: logits or log-probabilities over the whole vocabulary (gathered, where it is
            sharded over tensor-parallel ranks), tokens' shape plus `[V]`. -inf under the rollout is a token that it
            would not sample; -inf under the trainer alone makes the KL infinite and drops the sequence.
        max_kl, mean_kl: nats per token, or None for no such bound.
        chunk_tokens: tokens whose distributions are in memory at a time.

    Raises:
        InputError: shapes differ, no bound or a negative one, or a response token without a distribution.
    """
    _require_bounds(max_kl=max_kl, mean_kl=mean_kl)
    require_responses(responses)
    kl = together(
        lambda: _checked_kl(rollout_logits, trainer_logits, responses.mask, chunk_tokens), responses.context_group
    )
    keep = torch.ones(responses.num_sequences, dtype=torch.bool, device=kl.device)
    if max_kl is not None:
        keep &= responses.max(kl) <= max_kl
    if mean_kl is not None:
        keep &= responses.mean(kl) <= mean_kl
    return responses.expand(keep)


def _checked_kl(rollout_logits: Tensor, trainer_logits: Tensor, mask: Tensor, chunk_tokens: int) -> Tensor:
    """KL(mu_t || pi_t) of response tokens, 0 for others, float32 in the mask's shape."""
    require_tensors(trainer_logits=trainer_logits, rollout_logits=rollout_logits)
    if trainer_logits.shape != rollout_logits.shape or trainer_logits.shape[:-1] != mask.shape:
        raise InputError(
            f"trainer logits {list(trainer_logits.shape)} and rollout logits {list(rollout_logits.shape)} must both be"
            f" {list(mask.shape)} and a vocabulary"
        )
    trainer, rollout = trainer_logits.detach().flatten(0, -2), rollout_logits.detach().flatten(0, -2)
    chunks = mask.flatten().nonzero().flatten().split(chunk_tokens)
    divergences = [_kl(rollout[chunk], trainer[chunk]) for chunk in chunks]
    kl = torch.zeros(mask.shape, dtype=torch.float32, device=trainer_logits.device)
    if divergences:
        kl[mask] = torch.cat(divergences)
    if bool(kl.isnan().any()):
        raise InputError("the logits of a response token hold NaN or +inf, or are all -inf: no distribution")
    return kl


def _kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) of the last dimension, float32; terms of p = 0 count nothing."""
    log_p, log_q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    return torch.where(log_p == -torch.inf, 0, log_p.exp() * (log_p - log_q)).sum(-1)


def _require_bounds(**bounds: float | None) -> None:
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    if not given or min(given.values()) < 0:
        raise InputError(f"a trust region needs a bound of at least 0, got {bounds}")
