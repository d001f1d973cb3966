"""Importance weights that correct tokens sampled by the rollout for a trainer that would have sampled others.

Notation: mu is the rollout's policy, pi the trainer's (the old, or proximal, policy), r_t = pi / mu of token t.
All weights are detached: they change the measure under which a gradient is taken and carry none themselves. They come
in the tokens' shape, at least float32, with 0 for all but response tokens, so that they multiply with each other and
with the masks of `router_replay.mismatch.corrections.rejection`. A weight of 0 keeps its token in a loss's denominator;
to take it out as well, pass `responses.keep(weights > 0)` on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.arguments import require_tensors
from router_replay.mismatch.corrections.pointwise import masked_weight, truncated_weight
from router_replay.mismatch.faults import require_log_probabilities
from router_replay.mismatch.log_ratios import (
    Level,
    LogRatios,
    difference,
    exponential,
    require_log_ratios,
)
from router_replay.mismatch.ranks import together
from router_replay.mismatch.responses import Responses, require_responses


def truncated_importance_weights(ratios: LogRatios, *, level: Level = "token", cap: float = 2.0) -> Tensor:
    """Truncated importance sampling, TIS: w = min(rho, cap), rho = r_t, prod_t r_t or (prod_t r_t)^(1/T) by `level`.

    Token weights have little variance and leave the rollout's distribution of prefixes; the sequence weight is
    unbiased as the cap grows, with a variance that grows with the length of the response; the geometric mean does not
    depend on the length and is no importance weight of anything, only bounded.

    Source: Ionides, "Truncated importance sampling", J. Comp. Graph. Stat. 17 (2008); for this use Yao et al., "Your
    efficient RL framework secretly brings you off-policy RL training" (2025, fengyao.notion.site/off-policy-rl). There
    is no bound from below: a token that the trainer would never take gets weight 0.

    Args:
        cap: largest weight, above 0; `math.inf` for plain importance sampling, saturating at the dtype's range.

    Raises:
        InputError: another level, or a cap that is not above 0.
    """
    require_log_ratios(ratios)
    return truncated_weight(ratios.at(level), cap=cap).masked_fill(~ratios.responses.mask, 0)


def masked_importance_weights(
    ratios: LogRatios, *, level: Level = "token", lower: float = 0.5, upper: float = 2.0
) -> Tensor:
    """Masked importance sampling, MIS: w = rho if lower <= rho <= upper, else 0; rho by `level` as in TIS.

    Source: Liu, Li et al., "When speed kills stability: demystifying RL collapse from the training-inference mismatch"
    (2025, richardli.xyz/rl-collapse). A geometric mean needs bounds next to 1; it is the weight, too, and
    `geometric > 0` is the mask alone.

    Args:
        lower, upper: bounds of rho, both inclusive, compared as logarithms; 0 <= lower <= upper.

    Raises:
        InputError: another level, or bounds out of order.
    """
    require_log_ratios(ratios)
    return masked_weight(ratios.at(level), lower=lower, upper=upper).masked_fill(~ratios.responses.mask, 0)


def icepop_weights(ratios: LogRatios, *, lower: float = 0.5, upper: float = 5.0) -> Tensor:
    """IcePop: M(r_t) = r_t if alpha <= r_t <= beta, else 0; masked importance sampling of tokens with its own bounds.

    Source: Ring-1T, "Every step evolves" (arXiv 2510.18855), with alpha = 0.5 and beta = 5.

    Args:
        lower, upper: alpha and beta, as of `masked_importance_weights`.

    Raises:
        InputError: bounds out of order.
    """
    return masked_importance_weights(ratios, level="token", lower=lower, upper=upper)


def balance_heuristic_weights(
    *, trainer: Tensor, behaviours: Tensor, shares: Tensor, responses: Responses, level: Level = "sequence"
) -> Tensor:
    """Multiple importance sampling with the balance heuristic: w(y) = pi(y) / sum_m c_m mu_m(y).

    The samples of several behaviour policies are taken as samples of their mixture, whichever of them drew each. For
    behaviours that together cover pi, the mean of w f over all samples is unbiased, and no other combination has a
    variance that is lower by more than (1/min_m n_m - 1/sum_m n_m) times the square of the mean (Veach and Guibas,
    "Optimally combining sampling techniques for Monte Carlo rendering", SIGGRAPH 1995, theorem 1). Mixing token by
    token is unbiased for the first token, and beyond it where all behaviours visit contexts alike.

    Use it where a batch holds rollouts of several weight versions, or of several masks: `behaviours[m]` is what policy
    m gives to *all* samples' tokens, -inf for tokens that its mask excludes. The behaviours must not depend on the
    samples. A top-p mask, or routes, that follow from a sample's own tokens are part of one policy, the truncated or
    routed one: its own log-probability is the denominator (see `apply_sampling_mask`), and a mixture of such masks is
    biased.

    Unlike weights of `LogRatios`, which were checked when they were made, these wait for the device to be checked.

    Args:
        trainer: log-probabilities of the sampled tokens, tokens' shape.
        behaviours: the same under each of M behaviour policies, `[M, *tokens' shape]`; -inf is allowed.
        shares: c_m, the share of samples that policy m drew, `[M]`, or `[M, S]` where it differs by sequence (for
            example between prompts). Columns sum to 1.
        level: "token" mixes token by token, "sequence" mixes whole sequences; there is no geometric mixture.

    Raises:
        InputError: shapes or shares that do not fit, or a token that no behaviour can have sampled.
    """
    if level not in ("token", "sequence"):
        raise InputError(f"level must be 'token' or 'sequence' for a mixture of policies, got {level!r}")
    require_responses(responses)
    log_shares = together(
        lambda: _checked_shares(trainer, behaviours, shares, responses).log(), responses.context_group
    )
    behaviours, trainer = behaviours.detach(), trainer.detach()
    dtype = torch.promote_types(torch.promote_types(trainer.dtype, behaviours.dtype), torch.float32)
    behaviours, trainer = behaviours.double(), trainer.double()
    if level == "token":
        per_token = torch.stack([responses.expand(each) for each in log_shares])
        mixture = torch.logsumexp(behaviours + per_token, 0)
        require_log_probabilities(trainer, mixture, responses, ("trainer", "the mixture of behaviours"))
        return exponential(difference(trainer, mixture, responses).to(dtype), responses)
    certain = torch.zeros_like(trainer)
    require_log_probabilities(trainer, certain, responses, ("trainer", "the certain policy"))
    pi = responses.sum(difference(trainer, certain, responses))
    mixture = torch.logsumexp(torch.stack([responses.sum(each) for each in behaviours]) + log_shares, 0)
    if not bool(mixture.isfinite().all()):
        raise InputError(
            "a sequence has probability 0 (or NaN) under every behaviour policy: it cannot have been sampled"
        )
    return exponential(responses.expand(pi - mixture).to(dtype), responses)


def _checked_shares(trainer: Tensor, behaviours: Tensor, shares: Tensor, responses: Responses) -> Tensor:
    """Shares `[M, S]`, float64, of arguments whose shapes fit."""
    require_tensors(trainer=trainer, behaviours=behaviours, shares=shares)
    responses.require(trainer=trainer)
    if behaviours.shape[1:] != responses.mask.shape or not len(behaviours):
        raise InputError(
            f"behaviours {list(behaviours.shape)} must be [M, ...] over the response mask {list(responses.mask.shape)}"
        )
    num_sequences = responses.num_sequences
    if shares.shape not in ((len(behaviours),), (len(behaviours), num_sequences)):
        raise InputError(
            f"shares {list(shares.shape)} must be [{len(behaviours)}] or [{len(behaviours)}, {num_sequences}]: one for"
            " each behaviour, or for each behaviour and sequence"
        )
    # In float64: the logarithms of whole sequences are large, and their difference is small.
    shares = shares.to(responses.mask.device, torch.float64).reshape(len(behaviours), -1).expand(-1, num_sequences)
    # Sums of a few float32 shares are off by some eps each.
    wrong = (shares.sum(0) - 1).abs() > len(behaviours) * 1e-6
    if bool((wrong | (shares < 0).any(0)).any()):
        raise InputError(
            "shares of behaviours must be at least 0 and sum to 1 over the behaviours; the smallest is"
            f" {float(shares.min()):g}, and sums go from {float(shares.sum(0).min()):g} to"
            f" {float(shares.sum(0).max()):g}: divide the numbers of samples by their sum"
        )
    return shares
