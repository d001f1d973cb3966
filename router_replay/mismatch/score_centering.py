"""Score centering: what a loss would teach in expectation, whatever the reward, taken out of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.arguments import described, require_tensors
from router_replay.mismatch.faults import LARGEST_LOG
from router_replay.mismatch.log_ratios import saturating_exp
from router_replay.mismatch.losses import Aggregation, aggregate, require_clip_range
from router_replay.mismatch.responses import Responses, require_responses
from router_replay.mismatch.sampler_top_k import SamplerTopK

SMALLEST_TAIL = 1e-6
"""Mass of a tail, at least: what float32 leaves of 1 minus a sum near 1 is rounding (appendix A.3 of the paper)."""


def score_centering_loss(
    top_k: SamplerTopK,
    *,
    current: Tensor,
    advantages: Tensor,
    responses: Responses,
    old: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    weigh: Callable[[Tensor], Tensor] | None = None,
    weights: Tensor | None = None,
    aggregation: Aggregation = "sequence-mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """To be added to `grpo_loss`: its gradient is A_t E_mu[w s], s_v = grad log pi_theta(v), w_v what the loss has.

    The loss multiplies the score of the sampled token by A_t w_t. Tokens come from mu and scores from pi_theta, so that
    E_mu[w s] is not 0: whatever the rewards, every step drifts the same way, and that adds up over steps. Together the
    two losses have the gradient -A_t (w_t s_t - E_mu[w s]). Where mu = pi_theta this term has no gradient. It is not
    importance sampling: what is left is the covariance of advantage and score under mu, not under pi. Source: Marek and
    Ryabinin, "Score centering stabilizes off-policy reinforcement learning" (arXiv 2609.20807), eq. 9, 12 and 14.

    w_v is what `grpo_loss` has for v, had it been sampled: f(pi_old / mu) r, r = pi_theta / pi_old, and 0 where
    clipping by the sign of A_t stops it. With `weights` = TIS in the loss, `weigh` is its rule, `truncated_weight`.

    Of mu the top-k H is known, Q its mass there, P that of pi_theta. Beyond, mu and pi_old are taken to be in
    proportion to pi_theta (eq. 12; slime and NeMo-RL do so, too): mu(v) = rho pi_theta(v), rho = (1 - Q) / (1 - P).
    As sum_v pi_theta(v) s_v = 0, scores of H suffice: E_mu[w s] = sum_H (mu_v w_v - rho w_tail pi_theta(v)) s_v. The
    bias that is left is, without weights, sum over the tail of (mu(v) - rho pi_theta(v)) s_v: 0 where the proportions
    hold, and to no logit more than 1 - Q. With K = 0 nothing is centred. Rounding is up to some rho times 1e-7.

    The value of the loss says nothing; log that of `grpo_loss`, and `top_k.mass`, which should be near 1.

    Args:
        top_k: of the sampler at the same tokens.
        current: log-probabilities of `top_k.token_ids` under pi_theta, `[*tokens, K]`, with gradient (`logprobs_at`).
        advantages: tokens' shape, or `[S]`: those of the loss.
        old: as `current`, under the loss's `old`; None where that is pi_theta itself, as in a first update.
        clip_low, clip_high: those of the loss; `math.inf` as `clip_high` and 1 as `clip_low` for a loss without.
        weigh: f, from log(pi_old / mu) to weights of the same shape, or None for 1. Rules are in
            `corrections/pointwise.py`; of a loss whose weights hang on the sampled token it must be that of the loss.
        weights: further weights of the loss that do not hang on the token at each place, such as masks over sequences,
            tokens' shape; they are detached.
        aggregation, denominator: those of the loss, see `aggregate`.

    Returns:
        A scalar with a gradient to `current` alone. It waits for nothing; log-probabilities that are none (NaN, above
        0) make it NaN.

    Raises:
        InputError: shapes that differ, a clip range that does not hold 1, or what `aggregate` refuses.
    """
    require_responses(responses)
    require_clip_range(clip_low, clip_high)
    if not isinstance(top_k, SamplerTopK):
        raise InputError(f"top_k must be a SamplerTopK, got {described(top_k)}: make one with SamplerTopK.of(...)")
    shape = top_k.token_ids.shape
    old = current if old is None else old
    for name, values in (("current", current), ("old", old)):
        require_tensors(**{name: values})
        if values.shape != shape or shape[:-1] != responses.mask.shape:
            raise InputError(
                f"{name} {list(values.shape)}, the sampler's top-k {list(shape)} and the response mask"
                f" {list(responses.mask.shape)} do not fit: log-probabilities are those of top_k.token_ids, at the"
                " tokens of the mask"
            )
    if responses.is_per_sequence(advantages=advantages):
        advantages = responses.expand(advantages)
    advantages = advantages.detach()
    dtype = torch.promote_types(torch.promote_types(current.dtype, top_k.logprobs.dtype), torch.float32)
    there = (top_k.token_ids >= 0) & responses.mask[..., None]
    current = current.to(dtype).masked_fill(~there, 0)
    # What pi_theta cannot take has no score; in the loss its ratio is 0.
    impossible = current.detach() == -torch.inf
    with torch.no_grad():
        score = _coefficients(
            _with_tail(current, there),
            _with_tail(old.to(dtype), there),
            _with_tail(top_k.logprobs.to(dtype), there),
            advantages,
            (clip_low, clip_high),
            weigh,
        )
        score = score.masked_fill(~there | impossible, 0).masked_fill(current > LARGEST_LOG, torch.nan)
    losses = advantages.to(dtype) * (score * current.masked_fill(impossible, 0)).sum(-1)
    if weights is not None:
        responses.require(weights=weights)
        losses = losses * weights.detach().to(dtype)
    return aggregate(losses, responses, aggregation, denominator)


def _with_tail(logprobs: Tensor, there: Tensor) -> Tensor:
    """Log-probabilities of the top-k, -inf where there is none, and of all others together, `[*tokens, K + 1]`."""
    logprobs = logprobs.masked_fill(~there, -torch.inf)
    tail = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=SMALLEST_TAIL).log()
    return torch.cat([logprobs, tail], -1)


def _coefficients(
    current: Tensor,
    old: Tensor,
    sampler: Tensor,
    advantages: Tensor,
    clip: tuple[float, float],
    weigh: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """What the scores of the top-k are multiplied by, `[*tokens, K]`; of places without a token anything.

    The tail is one more candidate, of all policies in proportion to pi_theta, and so with one ratio.
    """
    ratio = saturating_exp(current - old)
    up, down = advantages[..., None] > 0, advantages[..., None] < 0
    stopped = (up & (ratio > 1 + clip[1])) | (down & (ratio < 1 - clip[0]))
    mass = sampler.exp() * ratio.masked_fill(stopped, 0)
    if weigh is not None:
        log_ratio = old - sampler
        found = weigh(log_ratio)
        if not isinstance(found, Tensor) or found.shape != log_ratio.shape:
            raise InputError(
                f"weigh must return weights of the shape of its log-ratios {list(log_ratio.shape)}, got"
                f" {described(found)}"
            )
        mass = mass * found.to(mass.dtype)
    of_tail = mass[..., -1:] / current[..., -1:].exp()
    return mass[..., :-1] - of_tail * current[..., :-1].exp()
