"""Log-ratios of two policies' probabilities, per token, per sequence, or per sequence as a geometric mean."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.responses import Responses

Level = Literal["token", "sequence", "geometric"]

LARGEST = 1e30


def log_ratio(
    numerator: Tensor, denominator: Tensor, responses: Responses, *, at_least: torch.dtype = torch.float32
) -> Tensor:
    """log(p_numerator / p_denominator) of each response token.

    Args:
        numerator, denominator: log-probabilities of the sampled tokens in nats, tokens' shape, any float dtype. The
            denominator is the policy that sampled (or the proximal one).
        at_least: the result's dtype, unless the inputs' is wider.

    Returns:
        Tokens' shape; 0 for all but response tokens; -inf where the numerator's probability is 0, and at most 1e30,
        so that no sum of a batch becomes infinite and meets that. Gradients flow to both.

    Raises:
        InputError: shapes differ; a response token has NaN or +inf, or probability 0 under the denominator,
            under which it cannot have been sampled; or every value is above 0 and one above 0.1, or one
            is above 0.5, which rounding does not do to logarithms of probabilities.
    """
    responses.require(numerator=numerator, denominator=denominator)
    for name, values in (("numerator", numerator), ("denominator", denominator)):
        if not values.is_floating_point():
            raise InputError(f"the {name}'s log-probabilities must be floating point, got {values.dtype}")
    dtype = torch.promote_types(torch.promote_types(numerator.dtype, denominator.dtype), at_least)
    # What padding holds may not reach the difference, whose gradient would be NaN, too.
    top = numerator.to(dtype).masked_fill(~responses.mask, 0)
    bottom = denominator.to(dtype).masked_fill(~responses.mask, 0)
    _require_log_probabilities(top.detach(), bottom.detach(), responses)
    return (top - bottom).clamp(max=LARGEST)


def at_level(ratio: Tensor, responses: Responses, level: Level) -> Tensor:
    """A token log-ratio (tokens' shape) as the log-ratio of its level, in the tokens' shape again.

    token: log r_t. sequence: sum_t log r_t, the ratio of the sequences' probabilities. geometric: mean_t log r_t.

    Raises:
        InputError: another level.
    """
    if level == "token":
        return ratio
    if level == "sequence":
        return responses.expand(responses.sum(ratio))
    if level == "geometric":
        return responses.expand(responses.mean(ratio))
    raise InputError(f"level must be 'token', 'sequence' or 'geometric', got {level!r}")


def saturating_exp(log_values: Tensor) -> Tensor:
    """An exp that saturates at the square root of the dtype's largest number, and has no gradient beyond.

    An infinite one would be NaN times an advantage or weight of 0; the root leaves room for products and sums.
    """
    return log_values.clamp(max=math.log(torch.finfo(log_values.dtype).max) / 2).exp()


def exponential(log_weights: Tensor, responses: Responses) -> Tensor:
    """`saturating_exp`, 0 for all but response tokens."""
    return saturating_exp(log_weights).masked_fill(~responses.mask, 0)


def _require_log_probabilities(top: Tensor, bottom: Tensor, responses: Responses) -> None:
    bad = top.isnan() | (top == torch.inf) | ~bottom.isfinite()
    # Rounding lifts the logarithm of a probability of 1 a little above 0, in bfloat16 by up to 0.25 for logits below
    # 64. Probabilities, taken for logarithms, are all above 0 even if none is large.
    positive = [
        (values > 0.5).any() | (((values > 0) | ~responses.mask).all() & (values > 0.1).any())
        for values in (top, bottom)
    ]
    # One transfer from the device, not three.
    any_bad, *too_high = torch.stack([bad.any(), *positive]).tolist()
    if any_bad:
        place = tuple(bad.nonzero()[0].tolist())
        raise InputError(
            f"{int(bad.sum())} of {int(responses.mask.sum())} response tokens have no log-ratio; the first, at "
            f"{list(place)}, has log-probability {top[place]:g} over {bottom[place]:g}. A token that was sampled has a "
            "probability above 0 under the policy that sampled it: look for tokens that the mask should leave out, and"
            " for log-probabilities taken after a top-p or top-k mask that was not the sampler's"
        )
    for name, values, wrong in zip(("numerator", "denominator"), (top, bottom), too_high, strict=True):
        if wrong:
            raise InputError(
                f"{int((values > 0).sum())} of {int(responses.mask.sum())} response tokens have a log-probability above"
                f" 0 in the {name}, up to {float(values.max()):g}: pass natural logarithms of probabilities, not"
                " probabilities and not losses"
            )
